"""How an option is converted and described: the machinery under `launch.options.train_options`, free of its keys."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

FOREIGN_KEYS: Mapping[str, str] = {
    "base_model": "model",
    "bf16": "dtype",
    "data_path": "data",
    "deepspeed": "ds",
    "deepspeed_config": "ds",
    "fp16": "dtype",
    "gradient_accumulation_steps": "batch_size",
    "learning_rate": "lr",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "rank",
    "lora_target_modules": "target_modules",
    "lr_scheduler_type": "lr_schedule",
    "model_name_or_path": "model",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "output_dir": "out",
    "per_device_train_batch_size": "micro_batch_size",
    "r": "rank",
    "resume_from_checkpoint": "resume",
    "train_batch_size": "batch_size",
    "train_sampling_strategy": "group_by_length",
    "val_set_size": "val_size",
}
"""What other trainers call our keys: hints only, never accepted in their place."""


@dataclass(frozen=True)
class Bounds:
    """An interval of numbers; `above` and `below` exclude their ends, `least` and `most` include them."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether a number lies inside (NaN never does)."""
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        low = (("of at least", self.least), ("above", self.above))
        high = (("at most", self.most), ("below", self.below))
        return " and ".join(f"{word} {end:g}" for word, end in low + high if math.isfinite(end))


@dataclass(frozen=True)
class OptionSpec:
    """One option as parsers and help texts see it."""

    name: str
    kind: Any
    """The resolved annotation, `Annotated[..., Bounds]` included."""
    default: Any


def option_specs(options_class: type) -> list[OptionSpec]:
    """The options of a dataclass, in order: its fields with a plain default."""
    kinds = get_type_hints(options_class, include_extras=True)
    return [
        OptionSpec(field.name, kinds[field.name], field.default)
        for field in dataclasses.fields(options_class)
        if field.default is not dataclasses.MISSING
    ]


def convert(value: object, kind: Any) -> Any:
    """A value from YAML, or text from a command line, as the annotated type.

    Raises:
        ValueError: the value is none of the kinds allowed, or out of bounds (the message says which).
    """
    for member in _members(kind):
        plain, bounds = _bounded(member)
        converted = _as_member(value, plain)
        if converted is _MISFIT:
            continue
        if bounds is not None and isinstance(converted, (int, float)) and not bounds.holds(converted):
            raise ValueError("is out of range")
        return converted
    raise ValueError("is not allowed")


def describe_kind(kind: Any) -> str:
    """The values that an annotation allows, in words."""
    words: list[str] = []
    for member in _members(kind):
        plain, bounds = _bounded(member)
        if get_origin(plain) is Literal:
            words += get_args(plain)
        else:
            words.append(f"{_KIND_WORDS[plain]} {bounds or ''}".rstrip())
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def mend(value: object, kind: Any) -> str:
    """What to give instead of a value that `convert` refused; names the nearest word of a choice."""
    words = [word for member in _members(kind) if get_origin(member) is Literal for word in get_args(member)]
    close = difflib.get_close_matches(str(value).lower(), words, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}give {describe_kind(kind)}"


def show(value: object) -> str:
    """A value as one would type it after `--key`."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def nearest(word: str, known: Iterable[str]) -> str:
    """The mend for a misspelt key: the nearest known one, or where to find them all."""
    plain = word.replace("-", "_").lower()
    names = list(known)
    meant = FOREIGN_KEYS.get(plain)
    close = [meant] if meant in names else difflib.get_close_matches(plain, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "--help lists all keys"


_MISFIT = object()
_KIND_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple[str, ...]: "names separated by commas",
    type(None): "none",
}


def _members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, in order; anything else stands alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _bounded(member: Any) -> tuple[Any, Bounds | None]:
    """The type under an `Annotated`, and the bounds it carries."""
    if get_origin(member) is Annotated:
        return member.__origin__, member.__metadata__[0]
    return member, None


def _as_member(value: object, kind: Any) -> object:
    """The value as one non-union type, or `_MISFIT`."""
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else _MISFIT
    if kind is type(None):
        return None if value is None or value == "none" else _MISFIT
    if kind is bool:
        return _as_bool(value)
    if kind in (int, float):
        return _as_number(value, kind)
    if kind is str:
        return value if isinstance(value, str) else _MISFIT
    return _as_names(value)


def _as_bool(value: object) -> object:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), _MISFIT)
    return value if isinstance(value, bool) else _MISFIT


def _as_number(value: object, kind: type[int] | type[float]) -> object:
    """Text is converted too: YAML reads `3e-4`, which has no point, as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _MISFIT
    if kind is int and isinstance(value, float):
        return _MISFIT
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return _MISFIT
    return number if math.isfinite(number) else _MISFIT


def _as_names(value: object) -> object:
    entries = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, str) for entry in entries):
        return _MISFIT
    names = tuple(entry.strip() for entry in entries)
    return names if names and all(names) else _MISFIT
