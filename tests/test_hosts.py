"""Hosts in namespaces are what tests take them for, and leave nothing behind."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import HOME, Site, missing, parent, site, state, wait_for

# Sends datagrams to an address, one after the other. Prints how many were answered, and the longest time that took.
ASK = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(float(sys.argv[3]))
answered, longest = 0, 0.0
for number in range(int(sys.argv[2])):
    begun = time.monotonic()
    s.sendto(b"%d" % number, (sys.argv[1], 7))
    try:
        while s.recv(9) != b"%d" % number:
            pass
    except TimeoutError:
        continue
    answered, longest = answered + 1, max(longest, time.monotonic() - begun)
print(answered, longest)
"""
# Answers datagrams, and writes one byte for each into a file.
ANSWER = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 7))
heard = open(sys.argv[1], "wb", buffering=0)
print("ready", flush=True)
while True:
    data, who = s.recvfrom(9)
    heard.write(b".")
    s.sendto(data, who)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two hosts, the second of which answers."""
    folder = tmp_path_factory.mktemp("hosts")
    with site(folder, "one", "two") as made:
        started = made["two"].popen(sys.executable, "-c", ANSWER, str(folder / "heard"), stdout=subprocess.PIPE)
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        yield made


def ask(pair: Site, count: int = 3, seconds: float = 0.2) -> tuple[int, int, float]:
    """How many questions of the first host the second one heard, how many answers came, and the longest time of one."""
    heard = pair.folder / "heard"
    before = heard.stat().st_size
    printed = pair["one"].run(sys.executable, "-c", ASK, pair["two"].address, str(count), str(seconds))
    answered, longest = printed.split()
    return heard.stat().st_size - before, int(answered), float(longest)


def test_a_host_has_a_name_a_home_processes_and_a_network_of_its_own(pair: Site) -> None:
    one, two = pair["one"], pair["two"]
    assert one.run("hostname") == "one\n"
    assert one.run("sh", "-c", "cd ~ && pwd && echo mine > file") == f"{HOME}\n"
    assert (one.tmp / "home" / "file").read_text() == "mine\n"
    with pytest.raises(OSError, match="No such file"):
        two.run("cat", f"{HOME}/file")
    assert not one.pids(str(pair.folder / "heard"))
    assert len(two.pids(str(pair.folder / "heard"))) == 1
    addresses = [line.split()[2] for line in one.run("ip", "-4", "-brief", "address").splitlines()]
    assert addresses == ["127.0.0.1/8", f"{one.address}/24"]
    one.run(sys.executable, "-c", "import ray_dnn")


def test_a_cable_can_be_cut_both_ways_or_one_way_and_lose_a_part(pair: Site) -> None:
    two = pair["two"]
    try:
        assert ask(pair)[:2] == (3, 3)
        two.cut()
        assert ask(pair)[:2] == (0, 0)
        two.lose(back=100)
        assert ask(pair)[1] == 0
        two.lose(to=50)
        assert 3 < ask(pair, 40, 0.05)[1] < 37
    finally:
        two.mend()
    assert ask(pair)[:2] == (3, 3)


def test_one_way_a_host_hears_and_is_not_heard(pair: Site) -> None:
    two = pair["two"]
    try:
        assert ask(pair)[:2] == (3, 3)  # so that each knows the other's card
        two.lose(back=100)
        assert ask(pair)[:2] == (3, 0)
    finally:
        two.mend()


def test_a_frozen_host_does_nothing_and_goes_on_where_it_was(pair: Site) -> None:
    two = pair["two"]
    two.freeze()
    try:
        assert ask(pair)[:2] == (0, 0)
    finally:
        two.thaw()
    assert ask(pair)[1] == 3
    two.signal(signal.SIGSTOP, "heard")
    assert ask(pair)[1] == 0
    two.signal(signal.SIGCONT, "heard")
    assert ask(pair)[1] == 3


def test_a_long_cable_takes_its_time(pair: Site) -> None:
    for seconds in (0.1, 0.2, 0):
        pair["two"].delay(seconds)
        _, answered, longest = ask(pair, seconds=10)
        assert answered == 3
        assert longest >= seconds


def test_hosts_end_with_the_process_that_made_them_even_when_it_is_killed(tmp_path: Path) -> None:
    if lacking := missing():
        pytest.skip(lacking)
    script = """
import subprocess, sys, pathlib, hosts
with hosts.site(pathlib.Path(sys.argv[1]), "one") as site:
    site["one"].delay(0.1)
    site["one"].popen("sleep", "1000")
    hosts.wait_for("sleeper", lambda: site["one"].pids("sleep"))
    site["one"].freeze()
    print("ready", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"ready\n"
        began = descendants(maker.pid)
        assert len(began) > 5
        maker.kill()
    wait_for("end of all that was started", lambda: all(state(pid) in "ZX" for pid in began))


def descendants(pid: int) -> list[int]:
    """The processes that a process and its children have started."""
    parents = {int(folder.name): parent(int(folder.name)) for folder in Path("/proc").glob("[0-9]*")}
    found = [pid]
    for one in found:
        found += [child for child, its in parents.items() if its == one]
    return found[1:]
