"""What the rest of a run must know of a method before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class MethodTraits:
    """The ways in which methods differ."""

    changes_ranks: bool = False
    """It is FlexLoRA: it has λ, and ranks that our controller changes."""
    has_calendar: bool = False
    """Its ranks change by the calendar of `adjust_start`, `adjust_freeze` and `adjust_interval`."""
    has_rank: bool = True
    """The option `rank` says how large it is."""
    trains_base: bool = False
    """All of the base's weights are trained, and the run leaves a model and no adapter."""
    others: tuple[str, ...] = ()
    """Options of the library that it looks at beside those that follow from the above."""

    def looks_at(self, option: str) -> bool:
        """Whether one of the library's options has an effect with it."""
        return (
            self.changes_ranks
            or option in (*_ALL_METHODS, *self.others)
            or (self.has_rank and option in _RANK)
            or (self.has_calendar and option in _CALENDAR)
        )


_ALL_METHODS = ("weight_decay", "seed")
_RANK = ("rank", "alpha", "dropout", "target_modules")
_CALENDAR = ("adjust_start", "adjust_freeze", "adjust_interval")


TRAITS: Mapping[str, MethodTraits] = MappingProxyType(
    {
        "flexlora": MethodTraits(changes_ranks=True, has_calendar=True),
        "lora": MethodTraits(),
        "rslora": MethodTraits(),
        "dora": MethodTraits(),
        "pissa": MethodTraits(),
        "olora": MethodTraits(),
        "lora_ga": MethodTraits(others=("init_batches",)),
        "adalora": MethodTraits(has_calendar=True),
        "peft": MethodTraits(has_rank=False, others=("target_modules",)),  # where its file names none
        "full": MethodTraits(has_rank=False, trains_base=True),
    }
)
"""By the name of the method."""
