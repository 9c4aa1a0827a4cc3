"""The other processes of a run, watched: who of them is gone, and which of those left says it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from launch.distributed.agreement import gather
from launch.distributed.heartbeat import Heartbeat
from launch.distributed.members import gather_members, in_words
from launch.distributed.process import Process
from launch.distributed.process_table import find_process, has_ended

_LEAVING_SECONDS = 2.0  # between processes that leave alike, for one and the same error
_PARTING_SIGNS = 3  # intervals for the others to find or read the same, before the one that said it ends
_AGAIN = "start the run again: it resumes from its last checkpoint"


class Peers:
    """The other processes of the run: those on this host by the process table, all by their signs of life; collective.

    Args:
        timeout: seconds without a sign of life after which a process counts as gone.

    Raises:
        RunError: the rendezvous cannot be reached.
    """

    def __init__(self, process: Process, timeout: float) -> None:
        self._members = gather_members(process)
        self._me = self._members[process.rank]
        self._here = [m for m in self._members if m.machine == self._me.machine and m is not self._me]
        found = {m.rank: find_process(m.pid, m.started) for m in self._here}
        self._table = {rank: other for rank, other in found.items() if other}
        self._timeout = timeout
        self._limit = timeout
        self._missed_since: float | None = None
        self._lost: Sequence[int] = ()
        (run, *_) = gather(process, secrets.token_hex(8))
        self._heartbeat = Heartbeat(process.rank, [m.rank for m in self._members], f"life/{run}")
        gather(process, "constructed")  # a barrier: every sign can be read from now on
        self._heartbeat.start()

    @property
    def speaks(self) -> bool:
        """Whether this is the lowest process left on its host, which says what was found."""
        gone = {*self._lost, *self._ended(), *self._heartbeat.silent(self._hurried)}
        return all(self._me.rank < member.rank or member.rank in gone for member in self._here)

    @property
    def hurry_seconds(self) -> float:
        """How long it takes to see who is gone once a connection broke."""
        return self._hurried + 4

    def hurry(self) -> None:
        """A connection broke: whoever is silent now is gone."""
        self._limit = min(self._limit, self._hurried)

    def loss(self) -> str | None:
        """Who is gone, in one line; None while nobody is. For one thread, about once a second."""
        self._heartbeat.look()
        if self._heartbeat.finding:
            return self._heartbeat.finding
        ended = self._ended()
        if ended:
            self._missed_since = self._missed_since or time.monotonic()
            if time.monotonic() - self._missed_since > _LEAVING_SECONDS:
                return self._line(ended, died=True)
        silent = self._silent()
        if not silent:
            return None
        # A run of short patience may get here before the connection that broke with it has been heard of.
        return self._line(silent, died=self._limit < self._timeout or self._heartbeat.is_refused())

    def tell(self, line: str) -> None:
        """Have it said on every host that can be reached, and give the others time to leave first.

        Those on this host would take this process for one that died, and the rendezvous may end with it.
        """
        seconds = _PARTING_SIGNS * self._heartbeat.interval
        deadline = time.monotonic() + seconds
        if not self._heartbeat.finding:
            self._heartbeat.tell(line, seconds)
        alone = len(self._table) == len(self._members) - 1
        while time.monotonic() < deadline and not (alone and len(self._ended()) == len(self._table)):
            time.sleep(0.1)

    def wait_for_speaker(self) -> None:
        """Give the one that speaks time to find the same: a connection that broke would make it say something else."""
        time.sleep(_PARTING_SIGNS * self._heartbeat.interval)

    def leave(self) -> None:
        """Fall silent, and watch nobody any more."""
        self._heartbeat.stop()

    @property
    def _hurried(self) -> float:
        return 6 * self._heartbeat.interval

    def _ended(self) -> list[int]:
        return [rank for rank, other in self._table.items() if has_ended(other)]

    def _silent(self) -> list[int]:
        if self._heartbeat.is_cut_off(self._limit):
            first = self._members[0]
            return [m.rank for m in self._members if m.machine == first.machine and m is not self._me]
        # Who fell silent with one that is gone may have given its last sign a little later.
        return self._heartbeat.silent(self._limit) and self._heartbeat.silent(self._limit / 2)

    def _line(self, ranks: Sequence[int], *, died: bool) -> str:
        self._lost = ranks
        names = in_words([self._members[rank] for rank in ranks], self._members)
        who = " and ".join(names)
        if died:
            return f"{who} {'is' if len(names) == 1 else 'are'} gone; {_AGAIN}"
        silence = f"no sign of life for {self._timeout:g} s from {who.rstrip(',')}"
        return f"{silence}; look there and at the network between, then {_AGAIN}"
