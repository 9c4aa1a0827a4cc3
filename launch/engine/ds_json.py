"""A user's DeepSpeed JSON, as it was written: read once, every fault with its line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora_ds.errors import UserError
from flexlora_ds.files.reading import JSON_FAULTS, json_fault, read_text

SHIPPED = Path(__file__).parents[2] / "ds_configs"
DEEPEST = 50
"""Levels of nesting; DeepSpeed knows of five."""


@dataclass(frozen=True)
class DsJson:
    """A user's DeepSpeed JSON as it was read; nothing in it is changed."""

    settings: Mapping[str, Any]
    origin: str
    """How messages call it."""


def read_ds_json(source: str | Path | Mapping[str, Any]) -> DsJson:
    """The JSON at a path, or its content; `ds_configs/NAME` is found from any working directory.

    Raises:
        UserError: the file is missing, or is no JSON object (with the line).
    """
    if isinstance(source, Mapping):
        settings, origin = dict(source), "DeepSpeed config"
    else:
        settings, origin = _parsed(_found(Path(source))), str(source)
    if settings.get("bfloat16") is not None:  # DeepSpeed's older name of the same block
        settings["bf16"] = settings.pop("bfloat16")
    for block in ("zero_optimization", "bf16", "fp16", "optimizer", "data_types"):
        if not isinstance(settings.get(block, {}), dict):
            raise UserError(f"{block} is no JSON object", f"{origin}, key {block}", "write {...}")
    return DsJson(settings, origin)


def _found(path: Path) -> Path:
    """The path, or the shipped file that it names where the working directory has none of this name."""
    shipped = SHIPPED / path.name
    return (
        shipped if path == Path(SHIPPED.name, path.name) and not path.exists() and shipped.is_file() else path
    )


def _parsed(path: Path) -> dict[str, Any]:
    text = read_text(path, "give --ds a DeepSpeed JSON; ds_configs/ has some")
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _without_repeats(pairs, path))
    except UserError:  # from the hook
        raise
    except JSON_FAULTS as error:
        place, remedy = _syntax(error, text)
        raise UserError(f"not valid JSON: {json_fault(error)}", f"{path}{place}", remedy) from None
    if not isinstance(value, dict):
        raise UserError("the DeepSpeed JSON is no object", str(path), "write {...}")
    _require_shallow(value, path)
    return value


def _syntax(error: BaseException, text: str) -> tuple[str, str]:
    """The line of a fault in JSON, and what to do about it."""
    if not isinstance(error, json.JSONDecodeError):
        return "", "correct it"
    line = text.split("\n")[error.lineno - 1].strip()  # as json counts lines
    comment = line.startswith(("//", "#", "/*")) or "//" in line
    return f", line {error.lineno}", "JSON has no comments: remove this one" if comment else "correct it"


def _without_repeats(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise UserError(f"key {key} stands twice in one block", str(path), "remove one of them")
        seen[key] = value
    return seen


def _require_shallow(value: dict[str, Any], path: Path) -> None:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise UserError(f"nested more than {DEEPEST} levels deep", str(path), "correct it")


def _inside(value: Any) -> list[Any]:
    """The objects and lists within a value."""
    inner = value.values() if isinstance(value, dict) else value
    return [one for one in inner if isinstance(one, (dict, list))]
