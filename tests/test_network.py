"""What an agent's environment says about its connections."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import RayTaskError

from ray_dnn.comm.listener import NoPortError
from ray_dnn.errors import ConfigError
from ray_dnn.fleet import Fleet
from ray_dnn.network import AUTHORITY, CERTIFICATE, KEY, PORTS, USE_TLS, Network, TlsFiles

examples = settings(deadline=None, derandomize=True, max_examples=50)

FILES = {CERTIFICATE: "node.pem", KEY: "node.key", AUTHORITY: "authority.pem"}


def test_without_variables_ports_are_any_and_connections_plain() -> None:
    assert Network.of({}) == Network.of({PORTS: " ", USE_TLS: "0", **FILES}) == Network(None, None)


@examples
@given(st.integers(1024, 65535), st.integers(0, 64511), st.sampled_from(["{}-{}", " {} - {} "]))
def test_a_range_of_ports_holds_both_its_ends(first: int, more: int, form: str) -> None:
    last = min(first + more, 65535)
    assert Network.of({PORTS: form.format(first, last)}).ports == range(first, last + 1)
    assert Network.of({PORTS: str(first)}).ports == range(first, first + 1)


@examples
@given(
    st.sampled_from(["80", "1023-2000", "2000-65536", "30000-20000", "a-b", "20000-", "20000:20100", "0", "²0000"])
    | st.text(st.characters(categories=["L", "P"]), min_size=1)
)
def test_what_is_no_range_of_ports_is_refused_by_name(given: str) -> None:
    with pytest.raises(ConfigError, match=r"RAY_DNN_PORTS.*such as 20000-20100"):
        Network.of({PORTS: given})


@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_tls_is_used_where_ray_uses_it(value: str) -> None:
    assert Network.of({USE_TLS: value, **FILES}).tls == TlsFiles("node.pem", "node.key", "authority.pem")


@pytest.mark.parametrize("name", FILES)
def test_tls_without_one_of_its_files_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"RAY_USE_TLS=1 needs {name}"):
        Network.of({USE_TLS: "1", **FILES, name: ""})


def test_an_agent_that_finds_no_port_is_gone_and_the_run_goes_on() -> None:
    told: list[tuple[str, str]] = []
    owner = SimpleNamespace(on_lost=lambda replica, reason: told.append((replica, reason)))
    fleet: Any = SimpleNamespace(_owner=owner)
    cause = NoPortError("RAY_DNN_PORTS=20000-20001: all 2 ports are taken")
    Fleet.broken(fleet, "agent-3", RayTaskError("open", "traceback", cause))  # type: ignore[arg-type]
    assert told == [("agent-3", str(cause))]
