"""Hosts of their own on one machine: for tests that cut networks, freeze machines and log in over ssh.

Theory of operation
-------------------
A host is a set of Linux namespaces: it has its own network card, processes, name, home, /tmp, /run and /dev/shm, and
shares all other files with this machine. Each has a cable to one bridge, which lives in a network namespace of its own,
the `Site`'s; so nothing of this can be seen from outside, names cannot collide, and many sites may exist at once.

A host lives as long as its first process, a shell that waits for the end of a pipe that this process holds. Whatever
way this process ends, the pipe ends, the kernel kills all other processes of that host with the first one, and with the
last process go network, mounts and all.

Cables are cut and made lossy by filters of the bridge, so both ends believe in a network that works. They are made long
by taking a host off the bridge and carrying its frames by hand (`cable.py`), for few kernels have netem.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "ip": "iproute2",
    "nft": "nftables",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
SSH_PROGRAMS = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "rsync": "rsync"}
NETWORK = "10.77.0."
PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOME = "/tmp/home"  # of every host, each in its own /tmp
WAIT_S = 30.0  # for a host to come or to go
ROOT_IS = {
    "passwd": f"root:x:0:0:root:{HOME}:/bin/bash",
    "shadow": "root:*:20000::::::",  # no password, and not locked: sshd lets in who has a key
}

_FILTER = """\
add table bridge site
add chain bridge site cables {{ type filter hook forward priority 0; }}
flush chain bridge site cables
{rules}"""


def missing(ssh: bool = False) -> str | None:
    """What this machine lacks for hosts, in words; None where it has all."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    needed = PROGRAMS | (SSH_PROGRAMS if ssh else {})
    if lacking := [f"{name} ({package})" for name, package in needed.items() if not _which(name)]:
        return f"hosts in namespaces need these programs: {', '.join(lacking)}"
    tried = _run("unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc", "true", check=False)
    return f"no namespaces can be made here: {tried.stderr.strip()}" if tried.returncode else None


def _which(name: str) -> str | None:
    return shutil.which(name, path=PATHS)


def _run(*command: str, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; the error holds what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, **more)
    if check and done.returncode:
        raise OSError(f"{shlex.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done


@contextlib.contextmanager
def site(folder: Path, *names: str, ssh: bool = False) -> Iterator[Site]:
    """Hosts of these names, gone without a trace afterwards; the test is skipped where there can be none.

    Args:
        folder: that the hosts have in common, at the same place; homes lie below it. Should be empty.
        ssh: whether every host runs an sshd that lets in whoever is on one of them.
    """
    if lacking := missing(ssh):
        pytest.skip(lacking)
    made = Site(folder, ssh)
    try:
        for name in names:
            made.add(name)
        yield made
    finally:
        made.close()


class Site:
    """A bridge, and hosts on it by name."""

    def __init__(self, folder: Path, ssh: bool = False):
        self.folder, self.ssh = folder, ssh
        self.hosts: dict[str, Host] = {}
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            wait_for("a network", lambda: _namespace(os.getpid(), "net") != _namespace(self._holder.pid, "net"))
            self.run("ip", "link", "set", "lo", "up")
            self.run("ip", "link", "add", "bridge", "type", "bridge")
            self.run("ip", "address", "add", f"{NETWORK}1/24", "dev", "bridge")
            self.run("ip", "link", "set", "bridge", "up")
            self.filter()
        except OSError as error:
            self.close()
            pytest.skip(f"hosts cannot have a network here: {error}")
        if ssh:
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def add(self, name: str) -> Host:
        """One more host, with a network and, if asked for, an sshd."""
        host = self.hosts[name] = Host(self, name, len(self.hosts) + 2)
        host.start()
        return host

    def enter(self) -> list[str]:
        """What makes a command run on the bridge's side."""
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]

    def run(self, *command: str, **more: Any) -> None:
        """Run a command on the bridge's side."""
        _run(*self.enter(), *command, **more)

    def filter(self) -> None:
        """Have the bridge lose what is to be lost."""
        rules = []
        for host in self.hosts.values():
            for way, percent in (("oifname", host.loss_to), ("iifname", host.loss_from)):
                if percent:
                    some = f"numgen random mod 100 < {percent} " if percent < 100 else ""
                    rules.append(f'add rule bridge site cables {way} "{host.card}" {some}drop')
        self.run("nft", "-f", "-", input=_FILTER.format(rules="\n".join(rules)))

    def close(self) -> None:
        """End all hosts."""
        for host in self.hosts.values():
            host.close()
        _end(self._holder)


class Host:
    """One host.

    Attributes:
        address: its IP address.
        card: the bridge's end of its cable.
        tmp: its /tmp, where this process sees it; `HOME` is in it.
        loss_to, loss_from: percent of the frames to it and from it that get lost.
    """

    def __init__(self, site: Site, name: str, number: int):
        self.name, self.address, self.card = name, f"{NETWORK}{number}", f"host{number}"
        self.loss_to = self.loss_from = 0
        self.tmp = site.folder / name / "tmp"
        self.site, self._number = site, number
        self._holder: subprocess.Popen[bytes] | None = None
        self._commands: list[subprocess.Popen[Any]] = []
        self._cable: subprocess.Popen[bytes] | None = None

    # -- coming and going ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the namespaces and plug the cable in."""
        (self.tmp / "home").mkdir(parents=True)
        self.tmp.chmod(0o1777)
        kinds = ["--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
        script = "\n".join([*self._furnish(), "echo ready", "read -r || true"])
        self._holder = subprocess.Popen(
            ["unshare", *kinds, "bash", "-ec", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise OSError(f"{self.name} could not be made: its shell says why above")
        self._first = next(pid for pid in self.pids() if _number_inside(pid) == 1)
        site, inside = self.site, ["nsenter", f"--net=/proc/{self._first}/ns/net", "ip"]
        site.run("ip", "link", "add", self.card, "type", "veth", "peer", "name", "eth0", "netns", str(self._first))
        site.run("ip", "link", "set", self.card, "master", "bridge", "up")
        _run(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        _run(*inside, "route", "add", "default", "via", f"{NETWORK}1")  # Ray asks which way it would be to the internet
        if site.ssh:
            self._start_sshd()

    def _furnish(self) -> list[str]:
        """Commands that give a host files of its own."""
        site, files = self.site, self.site.folder / self.name
        for name in ("passwd", "shadow"):
            (files / name).write_text(re.sub("^root:.*", ROOT_IS[name], Path("/etc", name).read_text(), flags=re.M))
        (files / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n")
        (files / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # where nobody listens: refused at once
        commands = [_words("hostname", self.name), "ip link set lo up"]
        commands += [_words("mount", "--bind", files / name, f"/etc/{name}") for name in ("passwd", "shadow", "hosts")]
        commands += ["mount -t tmpfs tmpfs /dev/shm", "mount -t tmpfs tmpfs /run", "mkdir /run/sshd"]
        commands += ["at=$(readlink -m /etc/resolv.conf)", 'mkdir -p "${at%/*}"', 'test -e "$at" || touch "$at"']
        commands += [f'mount --bind {shlex.quote(str(files / "resolv.conf"))} "$at"']
        for path in sorted({ROOT, site.folder, Path(sys.prefix), Path(sys.base_prefix)}):
            if path.is_relative_to("/tmp"):  # and so would be hidden below
                inside = self.tmp / path.relative_to("/tmp")
                commands += [_words("mkdir", "-p", inside), _words("mount", "--bind", path, inside)]
        return [*commands, _words("mount", "--rbind", self.tmp, "/tmp")]

    def _start_sshd(self) -> None:
        """Let in whoever has the site's key."""
        folder = self.site.folder
        (self.tmp / "home" / ".ssh").mkdir()
        shutil.copy(folder / "key.pub", self.tmp / "home" / ".ssh" / "authorized_keys")
        options = {
            "HostKey": folder / "key",
            "ListenAddress": self.address,
            "UsePAM": "no",
            "StrictModes": "no",  # homes lie in a /tmp
            "PidFile": "none",
            "PermitRootLogin": "yes",
        }
        sshd = shutil.which("sshd", path=PATHS)
        given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        with (folder / f"{self.name}.sshd").open("w") as log:
            self.popen(str(sshd), "-D", "-e", "-f", "/dev/null", *given, stderr=log)
        wait_for(f"sshd on {self.name}", lambda: "listening" in (folder / f"{self.name}.sshd").read_text())

    def close(self) -> None:
        """End the host and all that runs on it."""
        _end(self._holder)
        _end(self._cable)
        for command in self._commands:
            command.wait(WAIT_S)
            if command.stdout is not None:
                command.stdout.close()

    # -- what runs on it -----------------------------------------------------------------------------------------------

    def popen(self, *command: str, env: dict[str, str] | None = None, **more: Any) -> subprocess.Popen[str]:
        """Start a command on the host, in its home and with nothing of this process's environment.

        It lives as long as the host, if not ended by `signal`: killing what is returned does not reach it.
        """
        variables = {"HOME": HOME, "USER": "root", "PATH": f"{sys.prefix}/bin:{PATHS}", "LANG": "C.UTF-8"} | (env or {})
        # Only children of what enters a pid namespace are in it. The shell waits for its child; nsenter by itself would
        # stop when that is stopped, and could then not be ended with the host.
        enter = ["nsenter", f"--target={self._first}", "--net", "--mount", "--uts", "--pid", "--no-fork"]
        clean = ["env", "--ignore-environment", f"--chdir={HOME}", *(f"{n}={v}" for n, v in variables.items())]
        words = [*enter, *clean, "sh", "-c", '"$@"; exit $?', "sh", *command]
        started = subprocess.Popen(words, stdin=subprocess.DEVNULL, text=True, **more)
        self._commands.append(started)
        return started

    def run(self, *command: str, timeout: float = 60.0, **more: Any) -> str:
        """Run a command to its end. Returns what it printed; raises with that where it fails."""
        started = self.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)
        try:
            printed, _ = started.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{self.name}: {shlex.join(command)} took over {timeout:g} s: {error.stdout}") from None
        if started.returncode:
            raise OSError(f"{self.name}: {shlex.join(command)} ended with {started.returncode}: {printed}")
        return printed

    def pids(self, word: str = "") -> list[int]:
        """The processes on the host that have ``word`` in their command lines, by their numbers on this machine."""
        assert self._holder is not None
        mine = _namespace(self._holder.pid, "pid_for_children")
        found = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
        return [pid for pid in found if _namespace(pid, "pid") == mine and word in _command_line(pid)]

    def signal(self, number: signal.Signals, word: str) -> list[int]:
        """Send a signal to the processes with ``word`` in their command lines, one at least. Returns their pids."""
        pids = [pid for pid in self.pids(word) if pid != self._first]
        assert pids, f"nothing on {self.name} has {word!r} in its command line"
        _send(number, pids)
        return pids

    def freeze(self) -> None:
        """Stop all processes of the host. Its kernel goes on and acknowledges what still fits into its buffers."""
        while running := [pid for pid in self.pids() if pid != self._first and state(pid) not in "TtZX"]:
            _send(signal.SIGSTOP, running)
            time.sleep(0.001)  # a process in a system call stops a little later; one that forked has a child

    def thaw(self) -> None:
        """Have a frozen host go on."""
        _send(signal.SIGCONT, self.pids())

    # -- its cable -----------------------------------------------------------------------------------------------------

    def lose(self, to: int = 0, back: int = 0) -> None:
        """Have so many percent of the frames to the host and from it get lost, from now on; 0 mends the cable."""
        self.loss_to, self.loss_from = to, back
        self.site.filter()

    def cut(self) -> None:
        """Have nothing come to the host or from it. Nobody is told: the cards see a cable."""
        self.lose(100, 100)

    def mend(self) -> None:
        """Have everything come through again."""
        self.lose()

    def delay(self, seconds: float) -> None:
        """Have the way to the host and back take so much longer from now on, half of it each way."""
        site, private = self.site, f"long{self._number}"
        near, far = f"near{self._number}", f"far{self._number}"
        if self._cable is not None:
            site.run("ip", "link", "set", self.card, "master", "bridge")
            site.run("ip", "link", "delete", private)
            _end(self._cable)
            self._cable = None
        if not seconds:
            return
        site.run("ip", "link", "add", private, "up", "type", "bridge")
        words = [sys.executable, str(Path(__file__).with_name("cable.py")), near, far, str(seconds / 2)]
        self._cable = subprocess.Popen([*site.enter(), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._cable.stdout is not None
        if self._cable.stdout.readline() != b"ready\n":
            pytest.skip("cables cannot be long here: this kernel has no TAP devices")
        for card, bridge in ((near, private), (far, "bridge"), (self.card, private)):
            site.run("ip", "link", "set", card, "master", bridge, "up")


def _words(*words: object) -> str:
    return shlex.join(map(str, words))


def _end(holder: subprocess.Popen[bytes] | None) -> None:
    """End a process that waits for the end of its pipe."""
    if holder is not None:
        holder.communicate(timeout=WAIT_S)


def _send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_for(what: str, is_so: Callable[[], bool], seconds: float = WAIT_S, pause_s: float = 0.02) -> None:
    """Wait until something is so. ``pause_s``: between two looks."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {seconds:g} s")
        time.sleep(pause_s)


def _namespace(pid: int, kind: str) -> str | None:
    """Which namespace a process is in; None when it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return None


def _read(pid: int, file: str) -> str:
    """A file of a process; nothing when it has ended."""
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except OSError:
        return ""


def _command_line(pid: int) -> str:
    return _read(pid, "cmdline").replace("\0", " ")


def state(pid: int) -> str:
    """As in ps; X for a process that is gone."""
    return _stat(pid)[0]


def parent(pid: int) -> int:
    """The pid of a process's parent; 0 for a process that is gone."""
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    """What the kernel says of a process, from its state and its parent on."""
    return _read(pid, "stat").rpartition(") ")[2].split() or ["X", "0"]


def _number_inside(pid: int) -> int:
    """A process's number in its own pid namespace."""
    found = re.search(r"^NSpid:.*\s(\d+)$", _read(pid, "status"), re.MULTILINE)
    return int(found[1]) if found else 0
