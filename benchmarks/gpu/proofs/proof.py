"""What a proof of `benchmarks.gpu` is: a guarantee, how it is shown on a card, and the test of the same on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from benchmarks.gpu.section import Conditions

if TYPE_CHECKING:
    from benchmarks.gpu.proofs.teams import Teams

Verdict: TypeAlias = tuple[bool, str]
"""Whether a guarantee holds, and what was found."""
Lane: TypeAlias = Literal["here", "changes", "memory", "programs", "pair"]
"""Where a proof runs: in this process, or in those of a team. On a card the lanes run side by side."""


@dataclass(frozen=True)
class Proof:
    """One guarantee."""

    name: str
    test: str
    """The test that shows the same on a CPU: `path::function`."""
    prove: Callable[[Conditions, Teams], Verdict]
    """Raises `NotRunError` where it cannot be shown here."""
    lane: Lane = "changes"
    seconds: float = 2.0
    """What it may take on a card; it is not begun where less is left."""
    tiny: bool = True
    """Whether the tiny form has it; else its code runs there at another stage."""
