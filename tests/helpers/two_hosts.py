"""Two hosts on one machine: network namespaces that are joined by one link, and training processes in them.

    python -m tests.helpers.two_hosts NAMESPACE NAME MODULE ARGUMENTS...

runs `python -m MODULE ARGUMENTS` in the network namespace of a process, as a host of a name of its own. The namespaces
belong to two processes that end with the test's: nothing is left behind, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.helpers.launched import Launched
from tests.helpers.nursery import Nursery
from tests.helpers.processes import die_with_parent, rank_environments, scratch_file

ADDRESSES = ["10.77.0.1", "10.77.0.2"]
NAMES = ["first", "second"]
LINK = "link0"
_NEW_UTS = 0x04000000  # linux/sched.h: a host name of its own


@dataclass
class TwoHosts:
    """The hosts, and the processes of one run, by rank: the first half of them is on the first host."""

    holders: Sequence[int]
    run: Launched = field(default_factory=lambda: Launched([], []))

    def cut_link(self) -> None:
        """No packet goes from one host to the other any more."""
        self._ip(0, "link", "set", LINK, "down")

    def mend_link(self) -> None:
        """Packets go again."""
        self._ip(0, "link", "set", LINK, "up")

    def switch_off(self, host: int) -> None:
        """The host is gone: nobody gets a word from it."""
        self.cut_link()
        self.run.send(signal.SIGKILL, *self.ranks(host))

    def ranks(self, host: int) -> list[int]:
        """The processes on a host."""
        half = len(self.run.processes) // 2
        return list(range(host * half, host * half + half))

    def said(self, host: int) -> str:
        """What the processes of a host have written."""
        return "".join(self.run.said(rank) for rank in self.ranks(host))

    def errors(self, host: int) -> list[str]:
        """The lines of errors that a host has seen; AssertionError for a traceback."""
        assert "Traceback" not in self.said(host) and "frame #" not in self.said(host), self.said(host)
        return [line for line in self.said(host).splitlines() if line.startswith("error: ")]

    def start(
        self, nursery: Nursery, words: Sequence[str], stack: contextlib.ExitStack, per_host: int
    ) -> None:
        """Start a training run of so many processes on each host, as a launcher would."""
        common = {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": LINK, "LOCAL_WORLD_SIZE": str(per_host)}
        for rank, variables in enumerate(rank_environments(2 * per_host, common)):
            host, local = divmod(rank, per_host)
            output = stack.enter_context(scratch_file())
            where = [str(self.holders[host]), NAMES[host], "launch.train", *words]
            child = nursery.start(
                "tests.helpers.two_hosts", where, {**variables, "LOCAL_RANK": str(local)}, output
            )
            stack.callback(child.kill)
            self.run.processes.append(child)
            self.run.outputs.append(output)

    def _ip(self, host: int, *words: str) -> None:
        command = ["nsenter", "-t", str(self.holders[host]), "-n", "ip", *words]
        subprocess.run(command, check=True, capture_output=True)

    def join(self) -> None:
        """Lay the link between them."""
        first, second = map(str, self.holders)
        link = ["link", "add", LINK, "netns", first, "type", "veth", "peer", "name", LINK, "netns", second]
        subprocess.run(["ip", *link], check=True, capture_output=True)
        for host, address in enumerate(ADDRESSES):
            self._ip(host, "address", "add", f"{address}/24", "dev", LINK)
            self._ip(host, "link", "set", "lo", "up")
            self._ip(host, "link", "set", LINK, "up")


@contextmanager
def two_hosts(nursery: Nursery, words: Sequence[str], per_host: int = 1) -> Iterator[TwoHosts]:
    """A training run on two hosts; skips the test, visibly, where no namespaces can be made."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("needs unshare, nsenter and ip")
    with contextlib.ExitStack() as stack:
        hosts = TwoHosts([stack.enter_context(_namespace()) for _ in NAMES])
        try:
            hosts.join()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot join network namespaces: {error.stderr.decode().strip()}")
        hosts.start(nursery, words, stack, per_host)
        yield hosts


@contextmanager
def _namespace() -> Iterator[int]:
    """A network namespace; the process that it belongs to."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sleep", "infinity"],
        preexec_fn=die_with_parent,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        own = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{holder.pid}/ns/net").readlink() == own:
            if holder.poll() is not None:
                pytest.skip(f"cannot make a network namespace: {holder.communicate()[1].strip()}")
            time.sleep(0.01)
        yield holder.pid
    finally:
        holder.kill()
        holder.communicate()


def main() -> None:
    """Move to the namespace, and run the module there."""
    _, holder, name, module, *arguments = sys.argv
    library = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/proc/{holder}/ns/net", os.O_RDONLY)
    if library.setns(descriptor, 0) or library.unshare(_NEW_UTS):
        raise OSError(ctypes.get_errno(), "cannot move to the namespace")
    os.close(descriptor)
    socket.sethostname(name)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
