"""What a row of each log holds: by key, which values it may have. What a file says is looked at before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

LARGEST = 1 << 53
"""Whole numbers above it are no floating-point numbers, as plots need them."""

Check: TypeAlias = "Callable[[Any], bool]"


def is_count(value: Any) -> bool:
    """A whole number from 0 on; a truth value is none."""
    return type(value) is int and 0 <= value <= LARGEST


def is_number(value: Any) -> bool:
    """A finite number, or null: one that was not finite when it was written."""
    if type(value) is int:
        return abs(value) <= LARGEST
    return value is None or (type(value) is float and math.isfinite(value))


def is_bool(value: Any) -> bool:
    """true or false."""
    return isinstance(value, bool)


def is_rank(value: Any) -> bool:
    """A count that a matrix may have as its rank."""
    return is_count(value) and value < 1 << 31


def is_text(value: Any) -> bool:
    """A string that can be written as UTF-8: one with half of a surrogate pair cannot."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def list_of(check: Check) -> Check:
    """A list of such values."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def object_of(check: Check) -> Check:
    """An object of such values."""
    return lambda value: (
        isinstance(value, dict) and all(map(is_text, value)) and all(map(check, value.values()))
    )


VALIDATION: Mapping[str, Check] = {"step": is_count, "loss": is_number}

METRICS: Mapping[str, Check] = {
    **VALIDATION,
    "epoch": is_number,
    "orth": is_number,
    "lr": is_number,
    "grad_norm": is_number,
    "tokens": is_count,
    "tokens_per_s": is_number,
    "step_s": is_number,
    "peak_mem_gb": is_number,
    "total_rank": is_count,
    "skipped": is_bool,
}

ACCURACY: Mapping[str, Check] = {
    "step": is_count,
    "accuracy": object_of(is_number),
    "average": is_number,
    "items": is_count,
    "protocol": is_text,
    "seconds": is_number,
}
"""The keys of accuracy.jsonl: accuracies as fractions, by task."""

RANK_CHANGE: Mapping[str, Check] = {
    "step": is_count,
    "adjust_size": is_count,
    "importance": object_of(is_number),
    "score_margin": is_number,
    "pruned": list_of(is_text),
    "expanded": list_of(is_text),
    "prune_age": list_of(is_count),
    "ranks": object_of(is_rank),
    "total_rank": is_count,
    "trainable_params": is_count,
    "loss_before": is_number,
    "loss_after": is_number,
    "spectrum_error": is_number,
    "seconds": is_number,
}
"""The keys in the order of ranks.jsonl; `RankChange` of the library says what they mean."""


def is_moment(value: Any) -> bool:
    """[step, number]."""
    return isinstance(value, list) and len(value) == 2 and is_count(value[0]) and is_number(value[1])


def is_market(value: Any) -> bool:
    """What a market offered, or null where there was none."""
    return value is None or (isinstance(value, dict) and fault_of(value, MARKET) is None)


MARKET: Mapping[str, Check] = {
    "gain": object_of(is_number),
    "loss": object_of(is_number),
    "expected_gain": is_number,
    "expected_loss": is_number,
}
"""The keys of a row's `market`, which is null where the importance is a score."""

SOMETIMES: Mapping[str, Check] = {
    "warnings": list_of(is_text),
    "sigma": object_of(is_number),
    "noise": object_of(is_number),
    "newborn": object_of(list_of(is_moment)),
    "market": is_market,
}
"""Keys that a row may lack; those that its own kind has are as that says."""


def is_match(value: Any) -> bool:
    """What a run was to match."""
    kind = {"asked": is_text, "parameters": is_count}
    return isinstance(value, dict) and fault_of(value, kind) is None


SUMMARY: Mapping[str, Check] = {
    "state": is_text,
    "steps": is_count,
    "final_loss": is_number,
    "wall_seconds": is_number,
    "tokens": is_count,
    "tokens_per_s": is_number,
    "peak_mem_gb": is_number,
    "trainable_params": object_of(is_number),
    "match_params": is_match,
    "frozen_params": is_count,
    "rank_changes": is_count,
    "warnings": list_of(is_text),
    "versions": object_of(is_text),
}
"""The keys of summary.json; one of an older run may lack some."""


def is_new_direction(value: Any) -> bool:
    """An entry of `directions` in directions.json."""
    return isinstance(value, dict) and fault_of(value, NEW_DIRECTION) is None


def is_weighed(value: Any) -> bool:
    """An entry of `changes` in directions.json."""
    return isinstance(value, dict) and fault_of(value, WEIGHED) is None


NEW_DIRECTION: Mapping[str, Check] = {
    "matrix": is_text,
    "born": is_count,
    "how": is_text,
    "sigma": is_number,
    "noise": is_number,
    "lam": list_of(is_moment),
    "lam_end": is_number,
    "pruned": lambda value: value is None or is_count(value),
}

WEIGHED: Mapping[str, Check] = {"born": list_of(is_count), "survivors": is_count, "rise": is_number}

DIRECTIONS: Mapping[str, Check] = {
    "loss": is_number,
    "changes": list_of(is_weighed),
    "together": lambda value: value is None or is_weighed(value),
    "directions": list_of(is_new_direction),
}
"""The keys of directions.json (`launch.run_folder.new_directions`)."""


def fault_of(row: Any, kind: Mapping[str, Check]) -> str | None:
    """What is wrong with a row; None for nothing. Keys that are not known say nothing."""
    if not isinstance(row, dict):
        return "not an object"
    for key, check in kind.items():
        if key not in row:
            return f"{key} is missing"
        if not check(row[key]):
            return f"{key} has a value that no run writes"
    sometimes = {key: check for key, check in SOMETIMES.items() if key in row and key not in kind}
    odd = [key for key, check in sometimes.items() if not check(row[key])]
    return f"{odd[0]} has a value that no run writes" if odd else None
