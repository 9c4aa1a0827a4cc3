"""What the fuzzers share: how many inputs, which seed, and what any input may lead to.

`make test` tries a few inputs, the same ones each time. `make test-full` tries many, drawn from the seed
`FLEXLORA_FUZZ_SEED`. Where that is not set, one is chosen, and pytest's last lines name it.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from hypothesis import HealthCheck, seed, settings

from flexlora_ds.terminal.command import exit_code_of

F = TypeVar("F", bound=Callable[..., Any])

SEED = "FLEXLORA_FUZZ_SEED"
GIB = 1 << 30
LONGEST_LINE = 2_100
"""Characters of a reported error: 2,000 of the line, and the words around them."""


def is_long_run() -> bool:
    """Whether `make test-full` runs."""
    return os.environ.get("FLEXLORA_FULL") == "1"


def choose_seed() -> str | None:
    """The long run's seed, chosen where none is given; None for `make test`."""
    return os.environ.setdefault(SEED, str(secrets.randbelow(2**32))) if is_long_run() else None


def inputs(few: int, *, many: int) -> Callable[[F], F]:
    """How many inputs a fuzzer tries: `few` in `make test`, `many` in `make test-full`. Stands above `@given`."""
    long = is_long_run()
    chosen = settings(
        max_examples=many if long else few,
        derandomize=not long,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.function_scoped_fixture,
        ],
    )

    def apply(test: F) -> F:
        decorated: F = chosen(test)
        return seed(int(os.environ[SEED]))(decorated) if long else decorated

    return apply


class _Unending(BaseException):
    """Raised where the program is, past every `except Exception`."""


def answered(run: Callable[[], object], *, seconds: float = 30, memory: int = 2 * GIB) -> str | None:
    """Call an entry point as its command does: None where it takes the input, else the one line that refuses it.

    Args:
        seconds: more than any input may take; generous, for a busy machine.
        memory: bytes of address space that an input may take beyond those in use.

    Raises:
        AssertionError: no answer in time, one of several lines, or one for an error that nobody foresaw.
    """
    said = io.StringIO()
    try:
        with _bounded_time(seconds), _bounded_memory(memory), contextlib.redirect_stderr(said):
            code = exit_code_of(run, [])
    except _Unending:
        raise AssertionError(f"no answer within {seconds:g} s") from None
    text = said.getvalue()
    if code == 0:
        return None
    assert code in (1, 2), f"exit code {code}: {text}"
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    assert "--debug true shows where" not in text, f"not foreseen: {text}"
    assert lines[0].isprintable() and len(lines[0]) <= LONGEST_LINE, text
    return lines[0]


@contextlib.contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _Unending

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _bounded_memory(more: int) -> Iterator[None]:
    """Memory beyond `more` bytes is refused meanwhile; the refusal is a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
