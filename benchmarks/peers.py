"""The peers' training loops for the small job, each as the peer's own documentation writes it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks import small
from benchmarks.journal import Journal, NotRunError

TIMEOUT_S = 5.0  # of an exchange, in TorchFT's own example; Ray Train's example of TorchFT has 30
_END_S = 40.0  # that a peer has to end


@contextlib.contextmanager
def running(peer: str, folder: str, workers: int, batch: int, timeout_s: float = TIMEOUT_S) -> Iterator[Journal]:
    """The journal of a peer that trains, in a process and a cluster of its own: of one that hangs nothing is left.

    Args:
        peer: "ray_train" or "torchft".
        timeout_s: of an exchange of TorchFT. After the death of a worker the others wait for so long, too, unless they
            are its neighbours in the exchange.

    Raises:
        NotRunError: the peer is not installed.
    """
    if importlib.util.find_spec(peer) is None and peer != "ray_train":
        raise NotRunError(f"{peer} is not installed: pip install --constraint constraints.txt '.[bench]'")
    journal = Journal(f"{folder}/journal")
    call = f"from benchmarks import peers; peers.train({peer!r}, {folder!r}, {workers}, {batch}, {timeout_s})"
    root = Path(__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", call], cwd=root, stdout=subprocess.DEVNULL)
    try:
        yield journal
    finally:
        journal.stop()
        for end in (process.terminate, process.kill):
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                end()
        process.wait()


def train(peer: str, folder: str, workers: int, batch: int, timeout_s: float) -> None:
    """Train until the journal says stop."""
    make = {"ray_train": _ray_train, "torchft": _torchft}[peer]
    config = {"journal": f"{folder}/journal", "rows": batch // workers, "timeout_s": timeout_s}
    with small.cluster():
        make(config, folder, workers).fit()


def _ray_train(config: dict[str, Any], folder: str, workers: int) -> TorchTrainer:
    """Ray Train, elastic: one worker or more, and a checkpoint at the end of each epoch."""
    return TorchTrainer(
        ray_train_loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=(1, workers)),
        run_config=RunConfig(
            name="run",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def _torchft(config: dict[str, Any], folder: str, workers: int) -> TorchTrainer:
    """TorchFT, started by Ray Train's own `TorchftConfig`: each worker is a replica group, and replaced by itself."""
    from ray.train.v2.torch.torchft_config import TorchftConfig

    return TorchTrainer(
        torchft_loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers),
        # Fewer as the least, and under load some of them split off and go on by themselves.
        torch_config=TorchftConfig(lighthouse_kwargs={"min_replicas": workers - 1}, backend="gloo"),
        run_config=RunConfig(name="run", storage_path=folder, failure_config=FailureConfig(max_failures=-1)),
    )


def ray_train_loop(config: dict[str, Any]) -> None:
    """One worker of Ray Train."""
    torch.set_num_threads(1)
    journal = Journal(config["journal"])
    workers, rank = ray.train.get_context().get_world_size(), ray.train.get_context().get_world_rank()
    model = prepare_model(small.build_model())
    optimizer = small.build_optimizer(model)
    epoch, step = 0, 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            saved = torch.load(f"{folder}/state.pt")
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        epoch, step = saved["epoch"] + 1, saved["step"]
    group = torch.tensor(os.getpid())
    dist.broadcast(group, 0)
    data = TensorDataset(torch.from_numpy(small.table()))
    sampler = DistributedSampler(data, workers, rank)
    loader = DataLoader(data, config["rows"], sampler=sampler)
    while True:
        sampler.set_epoch(epoch)
        for (rows,) in loader:
            optimizer.zero_grad()
            small.loss(model, {"data": rows}).backward()
            optimizer.step()
            journal.write(int(group), step, True, workers)
            step += 1
        with tempfile.TemporaryDirectory() as folder:
            made = None
            if rank == 0:
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"epoch": epoch, "step": step}, f"{folder}/state.pt")
                made = Checkpoint.from_directory(folder)
            ray.train.report({"epoch": epoch}, checkpoint=made)
        epoch += 1
        stop = torch.tensor(journal.stopped, dtype=torch.int64)
        dist.all_reduce(stop)
        if stop:
            return


def _combine(manager: Any, model: torch.nn.Module) -> None:
    """Average the gradients of all workers.

    With TorchFT 0.2's own `DistributedDataParallel` an exchange that fails while it is waited for ends the process of
    every survivor (``assert fut._fut`` in its communication hook); the manager's all_reduce, which it is made of,
    survives.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    manager.allreduce(flat).wait()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def torchft_loop(config: dict[str, Any]) -> None:
    """One worker of TorchFT."""
    from torchft import DistributedSampler as LossySampler
    from torchft import Manager, Optimizer, ProcessGroupGloo
    from torchft.checkpointing.pg_transport import PGTransport

    torch.set_num_threads(1)
    journal = Journal(config["journal"])
    workers, rank = ray.train.get_context().get_world_size(), ray.train.get_context().get_world_rank()
    network = small.build_model()
    inner = small.build_optimizer(network)

    def load(state: dict[str, Any]) -> None:
        network.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    timeout = timedelta(seconds=config["timeout_s"])
    group = ProcessGroupGloo(timeout=timeout)
    manager = Manager(
        pg=group,
        min_replica_size=1,
        load_state_dict=load,
        state_dict=lambda: {"model": network.state_dict(), "optimizer": inner.state_dict()},
        world_size=1,
        rank=0,
        replica_id=f"replica_{rank}",
        timeout=2 * timeout,
        checkpoint_transport=PGTransport(group, timeout=2 * timeout, device=torch.device("cpu")),
    )
    optimizer = Optimizer(manager, inner)
    data = TensorDataset(torch.from_numpy(small.table()))
    sampler = LossySampler(data, replica_rank=rank, num_replica_groups=workers, group_rank=0, num_replicas=1)
    loader = DataLoader(data, config["rows"], sampler=sampler)
    epoch = 0
    while not journal.stopped:
        sampler.set_epoch(epoch)
        for (rows,) in loader:
            step = manager.current_step()
            optimizer.zero_grad()
            small.loss(network, {"data": rows}).backward()
            _combine(manager, network)
            optimizer.step()
            committed = manager.current_step() > step
            journal.write(manager._quorum_id, manager.current_step() - 1, committed, manager.num_participants())
            if journal.stopped:
                break
        epoch += 1
    manager.shutdown()
