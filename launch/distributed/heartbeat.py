"""Signs of life: each process gives one a second through the rendezvous' store, and reads those of the others.

A collective cannot tell a slow process from a dead host: it waits. A thread of its own goes on giving signs while the
main thread loads, compiles or tokenises for an hour, and falls silent with its process, its host or the network.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

_CONNECT = timedelta(seconds=10)
_LAST_SIGN = 1.0  # seconds that a sign under way may take, where the store can be reached
_LONGEST_LOOK = 5.0  # seconds between two looks that count: who was frozen itself has heard nobody meanwhile
_FINDING = "finding"  # the key of what the first to find out says


class Heartbeat:
    """This process's signs of life, and how long the others have given none.

    Args:
        ranks: all processes of the run.
        run: names the run, the same on every process: a store may have served an earlier one.
    """

    def __init__(self, rank: int, ranks: Sequence[int], run: str) -> None:
        self.interval = max(1.0, len(ranks) / 64)
        """Seconds between two signs; the store gets as many values a second as there are processes, squared."""
        self.finding = ""
        """What another process has found out; empty while there is nothing."""
        self._rank, self._ranks, self._run = rank, ranks, run
        self._clock = 0.0
        self._looked = time.monotonic()
        self._seen = dict.fromkeys(ranks, "")
        self._heard = dict.fromkeys(ranks, 0.0)
        self._answered = 0.0
        self._to_say = ""
        self._said = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._store: Store | None = self._connect()
        self._store.set(str(rank), "0")
        if rank == ranks[0]:
            self._store.set(_FINDING, "")

    def start(self) -> None:
        """Begin; every process has been constructed."""
        self._thread.start()

    def stop(self) -> None:
        """Fall silent; a sign that is being given is waited for."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_LAST_SIGN)

    def look(self) -> None:
        """Let time pass; for the thread that judges silence, about once a second."""
        now = time.monotonic()
        self._clock += min(now - self._looked, _LONGEST_LOOK)
        self._looked = now

    def silent(self, seconds: float) -> list[int]:
        """Who has given no sign of life for so long, while the store answered."""
        return [r for r in self._ranks if r != self._rank and self._answered - self._heard[r] > seconds]

    def is_cut_off(self, seconds: float) -> bool:
        """Whether the store has not answered for so long."""
        return self._clock - self._answered > seconds

    def is_refused(self) -> bool:
        """Whether the rendezvous' host answers, now, that nothing listens there: then its process has ended."""
        if self._store is not None:
            return False
        try:
            socket.create_connection(_rendezvous(), timeout=self.interval).close()
        except ConnectionRefusedError:
            return True
        except OSError:  # out of reach, which says nothing of the process
            return False
        return False

    def tell(self, finding: str, within: float) -> None:
        """Tell the others what was found out, if that is possible within so many seconds."""
        self._to_say = finding
        self._said.wait(within)

    def _connect(self) -> Store:
        store = TCPStore(*_rendezvous(), is_master=False, timeout=_CONNECT, wait_for_workers=False)
        return PrefixStore(self._run, store)

    def _beat(self) -> None:
        keys = [*map(str, self._ranks), _FINDING]
        count = 0
        while not self._stop.wait(self.interval):
            count += 1
            try:
                self._store = self._store or self._connect()
                self._store.set(str(self._rank), str(count))
                if self._to_say:
                    self._store.compare_set(_FINDING, "", self._to_say)
                    self._said.set()
                self._note([value.decode() for value in self._store.multi_get(keys)])
            except (RuntimeError, OSError):  # the store is gone or out of reach: time shows
                self._store = None

    def _note(self, values: list[str]) -> None:
        *signs, finding = values
        now = self._clock
        for rank, sign in zip(self._ranks, signs, strict=True):
            if sign != self._seen[rank]:
                self._seen[rank], self._heard[rank] = sign, now
        self._answered = now
        # Who found it out itself has its own way to leave.
        self.finding = "" if finding == self._to_say else finding


def _rendezvous() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
