"""What the rest of a run must know of a method before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class MethodTraits:
    """The ways in which methods differ."""

    changes_ranks: bool = False
    """It has λ, and ranks that change."""
    changes_base: bool = False
    """It takes what its adapter begins with out of the base's weights."""


TRAITS: Mapping[str, MethodTraits] = MappingProxyType(
    {
        "flexlora": MethodTraits(changes_ranks=True),
        "lora": MethodTraits(),
        "lora_ga": MethodTraits(changes_base=True),
    }
)
"""By the name of the method."""
