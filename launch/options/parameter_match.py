"""`match_params`: as many trained parameters as a LoRA has, or as a number says."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LIKE_LORA = re.compile(r"lora:([1-9]\d{0,4})")
_TOLD = 0.02
"""A share of what was asked for, above which a difference is explained."""
_NUMBER = re.compile(r"[1-9]\d{0,15}")


@dataclass(frozen=True)
class Asked:
    """A count to be matched: that of PEFT's LoRA at a rank, or the count itself."""

    text: str
    lora_rank: int | None = None
    count: int | None = None


def parse_match(text: str) -> Asked | None:
    """What `match_params` asks for; None where it is neither `lora:RANK` nor a number."""
    if like := _LIKE_LORA.fullmatch(text):
        return Asked(text, lora_rank=int(like[1]))
    return Asked(text, count=int(text)) if _NUMBER.fullmatch(text) else None


@dataclass(frozen=True)
class ParameterMatch:
    """The rank that comes nearest to what was asked for."""

    asked: str
    wanted: int
    """Parameters to be matched."""
    rank: int
    expected: float
    """Parameters at that rank: the mean over the run, where ranks change."""
    varies: bool = False
    low: float | None = None
    """The least that it may come to, by which matrices keep or gain directions; None: as expected."""
    high: float | None = None
    """The most."""
    nearer: int | None = None
    """The rank that would come nearer, now that the run's length is known."""

    def line(self) -> str:
        """Both counts in one line, and between what the first may lie where that matters."""
        what = "trainable parameters, the mean over the run," if self.varies else "trainable parameters"
        line = (
            f"rank {self.rank} by match_params {self.asked}: {self.expected:,.0f} {what} "
            f"for {self.wanted:,} ({self._apart(self.expected)})"
        )
        if self.low is not None and self.high is not None and self.high - self.low > _TOLD * self.wanted:
            line += (
                f", {self._apart(self.low)} to {self._apart(self.high)} by which matrices the changes favour"
            )
        if self.nearer is not None:
            line += f"; rank {self.nearer} comes nearer over this run: give max_steps"
        elif abs(self.expected / self.wanted - 1) > _TOLD:
            line += "; no whole rank comes nearer"
        return line

    def _apart(self, count: float) -> str:
        return f"{count / self.wanted - 1:+.2%}"
