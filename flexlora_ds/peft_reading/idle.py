"""Keys of `rank_pattern`, `alpha_pattern` and their like that mean no layer: PEFT passes over a misspelt one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexlora_ds.fields import nearest
from flexlora_ds.patterns import full_matches
from flexlora_ds.peft_reading.config import PLAIN_PATTERN, shown
from flexlora_ds.terminal.counted import counted

_END_OF_NAME = r"(.*\.)?({})$"
_IN_NAME = {"OSF": r".*({}).*"}
"""Kinds whose patterns may stand anywhere in a name (`osf/model.py` of PEFT 0.21)."""
_NO_NAMES = ("ADALORA",)
"""Kinds whose patterns come from PEFT itself, and are of tensors."""


@dataclass(frozen=True)
class IdleKey:
    """A key that gives nothing to any layer."""

    option: str
    key: str
    layers: int
    """How many there are to be matched."""
    hidden_by: str | None = None
    """The key before it that takes a layer it matches, and others beside it: the first one counts."""
    close: str | None = None
    """The last part of a layer's name that it may have meant."""

    def fault(self) -> str:
        """What is wrong."""
        name = f"{self.option} {shown(self.key)}"
        if self.hidden_by is not None:
            return (
                f"{name} has no effect: {shown(self.hidden_by)} stands before it, and the first match counts"
            )
        return f"{name} matches none of {counted(self.layers, 'adapted layer')}"

    def remedy(self) -> str:
        """What to do where it was meant."""
        if self.hidden_by is not None:
            return "write it first"
        return f"did you mean {shown(self.close)}?" if self.close else "correct it"


def idle_keys(config: Mapping[str, Any], names: Sequence[str], place: str) -> list[IdleKey]:
    """Those of a configuration in PEFT's format, in its order.

    Args:
        names: of the adapted layers, in the model that PEFT wraps.
        place: for messages.

    Raises:
        UserError: a key is no regular expression, or matching takes for ever.
    """
    kind = config.get("peft_type")
    kind = getattr(kind, "value", kind)
    if kind in _NO_NAMES:
        return []
    wrap = _IN_NAME.get(str(kind), _END_OF_NAME)
    found = []
    for option, given in config.items():
        if option.endswith("_pattern") and isinstance(given, dict):
            found += _idle(option, given, names, wrap, f"{place}, {option}")
    return found


def idle_lines(config: Mapping[str, Any], names: Sequence[str], place: str) -> tuple[str, ...]:
    """The same for an adapter that is trained already: it is what PEFT made of it, so a warning does."""
    return tuple(f"{key.fault()} ({place}); PEFT ignores it too" for key in idle_keys(config, names, place))


def _idle(
    option: str, given: Mapping[str, Any], names: Sequence[str], wrap: str, place: str
) -> list[IdleKey]:
    taken: dict[str, str] = {}
    found = []
    hits_of = dict(zip(given, _hits(list(given), names, wrap, place), strict=True))
    for key, hits in hits_of.items():
        others = [taken[name] for name in hits if name in taken and given[taken[name]] != given[key]]
        # Behind keys that are all narrower it is what remains for, and here nothing does.
        before = [other for other in others if not set(hits_of[other]) < set(hits)]
        free = [name for name in hits if name not in taken]
        taken |= dict.fromkeys(free, key)
        if not hits:
            close = nearest(key, {name.rpartition(".")[2] for name in names})
            found.append(IdleKey(option, key, len(names), close=close))
        elif before and not free:
            found.append(IdleKey(option, key, len(names), hidden_by=before[0]))
    return found


def _hits(keys: Sequence[str], names: Sequence[str], wrap: str, place: str) -> list[list[str]]:
    """What each key matches; those that may take long in a process of their own."""
    slow = [key for key in keys if not PLAIN_PATTERN.fullmatch(key)]
    bounded = dict(zip(slow, full_matches([wrap.format(key) for key in slow], names, place), strict=True))
    found = []
    for key in keys:
        if key in bounded:
            found.append(bounded[key])
        else:
            pattern = re.compile(wrap.format(key))
            found.append([name for name in names if pattern.match(name)])
    return found
