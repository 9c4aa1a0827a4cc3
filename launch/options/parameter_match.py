"""`match_params`: as many trained parameters as a LoRA has, or as a number says."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LIKE_LORA = re.compile(r"lora:([1-9]\d{0,4})")
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

    def line(self) -> str:
        """Both counts in one line."""
        what = "trainable parameters, the mean over the run," if self.varies else "trainable parameters"
        apart = self.expected / self.wanted - 1
        return (
            f"rank {self.rank} by match_params {self.asked}: {self.expected:,.0f} {what} "
            f"for {self.wanted:,} ({apart:+.2%})"
        )
