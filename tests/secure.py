"""Trains on a Ray cluster that uses TLS and a token, with strangers at its ports and a death on the way.

Run as a script, for Ray reads its environment while it is imported. Prints what came out, as JSON.
"""

import json
import os
import socket
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from jobs_for_tests import accuracy, digest, loss, trainer
from torch import nn

from ray_dnn import Audit
from ray_dnn.events import AgentStarted
from ray_dnn.network import AUTHORITY, Network
from ray_dnn.testing import Kill, start_with_faults

CONFIG = {"epochs": 4, "evaluate_every": 5}  # 28 steps
LIMIT_S = 20.0


def gated(gate: Path) -> Any:
    """The loss, once there is a file of this name."""

    def gated_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        while not gate.exists():
            time.sleep(0.01)
        return loss(model, batch)

    return gated_loss


def secure_job(path: Path, agents: int | tuple[int, int], gate: Path) -> Any:
    """Everything is sent that agents exchange, as between machines."""
    return trainer(path, agents, {"evaluate": accuracy, "loss": gated(gate)}, CONFIG, audit=Audit())


def listens(host: str, port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex((host, port)) == 0


def answer(host: str, port: int) -> str:
    """What becomes of a stranger who trusts the cluster's authority and has no certificate."""
    context = ssl.create_default_context(cafile=os.environ[AUTHORITY])
    with socket.create_connection((host, port), LIMIT_S) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as connection:
                assert connection.version() == "TLSv1.3"
                connection.sendall(bytes(64))
                return f"said {connection.recv(64)!r}"
        except (ssl.SSLError, ConnectionResetError) as error:
            return f"cut off: {error}"


def main(path: Path) -> None:
    ray.init(address="local", num_cpus=8, object_store_memory=200 * 2**20, include_dashboard=False)
    ports, host = Network.of(os.environ).ports, ray.util.get_node_ip_address()
    assert ports is not None
    faults = [Kill("exchange-middle", step=9, rank=1)]
    run = start_with_faults(secure_job(path, (1, 2), path / "gate"), faults, {0: 2, 15: 2})
    started = 0
    for event in run.handle.events():
        started += isinstance(event, AgentStarted)
        if started == 2:
            break
    agents = [port for port in ports if listens(host, port)]
    found = {
        "agents": len(agents),
        "elsewhere": [port for port in agents if listens("127.0.0.1", port)],
        "answers": [answer(host, port) for port in agents],
    }
    (path / "gate").touch()
    result = run.result()
    print(json.dumps(found | {"digest": digest(result), "path": result.path}))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
