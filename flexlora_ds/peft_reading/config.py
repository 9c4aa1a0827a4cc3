"""What an `adapter_config.json` may say where an adapter is read as plain LoRA: ΔW = scale · B A on an unchanged base.

The list is one of what is allowed. A key that is not in `HARMLESS` may change what the tensors mean, also one that a
later PEFT invents: it must be absent, or hold nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flexlora_ds.errors import UserError
from flexlora_ds.files.reading import read_json_object
from flexlora_ds.patterns import full_matches, pattern_fault
from flexlora_ds.peft_format import CONFIG_FILE

KEEP_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights, beside true and false, that leave the base's weights as they are."""
_UNREADABLE = "give a folder with an adapter in it"
_MORE = "merge it into its base with PEFT itself"
_CONVERT = (
    "convert it where it was trained: save_pretrained(DIR, path_initial_model_for_weight_conversion=START)"
)


class Kind(NamedTuple):
    """A type of value in words, and how it is recognised."""

    words: str
    holds: Callable[[Any], bool]


def _optional(kind: Kind) -> Kind:
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.holds(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_whole(value) and 1 <= value <= 1 << 16


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_layers(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value)))


TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
RANK = Kind("a whole number from 1 to 65536", _is_rank)
NUMBER = Kind("a finite number", _is_number)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
NAMES = Kind("a text or a list of texts", _is_names)
LAYERS = Kind("a whole number or a list of them", _is_layers)
RANKS = Kind(
    "an object of whole numbers from 1 to 65536",
    lambda v: isinstance(v, dict) and all(map(_is_rank, v.values())),
)
NUMBERS = Kind(
    "an object of finite numbers", lambda v: isinstance(v, dict) and all(map(_is_number, v.values()))
)
INIT = Kind("true, false or a text", lambda value: isinstance(value, (bool, str)))

PLAIN_PATTERN = re.compile(r"\^?(\w|\\?[.-])+\$?")
"""Names, as most patterns are: they match at once."""
_REGULAR = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": r"(^|.*?\.){}\.\d+\..*",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
"""Where regular expressions stand, and what PEFT puts around them."""

REQUIRED = {"r": RANK, "lora_alpha": NUMBER}
"""Without these there is no scale."""
HARMLESS: Mapping[str, Kind] = {
    **REQUIRED,
    **{
        key: _optional(kind)
        for key, kind in {
            # What it is called, and what it was made for.
            "peft_type": TEXT,
            "peft_version": TEXT,
            "task_type": TEXT,
            "auto_mapping": OBJECT,
            "base_model_name_or_path": TEXT,
            "revision": TEXT,
            "inference_mode": FLAG,
            # Which layers were adapted: the tensors' names say it.
            "target_modules": NAMES,
            "exclude_modules": NAMES,
            "layers_to_transform": LAYERS,
            "layers_pattern": NAMES,
            # What training alone reads.
            "lora_dropout": SHARE,
            "init_lora_weights": INIT,
            "eva_config": OBJECT,
            # The scale of each matrix.
            "rank_pattern": RANKS,
            "alpha_pattern": NUMBERS,
            "use_rslora": FLAG,
            # PEFT goes by the layer's type, whatever this says.
            "fan_in_fan_out": FLAG,
            "bias": TEXT,
            # PEFT drops it before it reads the others.
            "runtime_config": OBJECT,
            # Names and sizes that mean nothing until another key asks for them.
            "megatron_core": TEXT,
            "qalora_group_size": Kind("a whole number", _is_whole),
        }.items()
    },
}


def read_config(folder: Path) -> dict[str, Any]:
    """The object in an adapter's configuration file; UserError where there is none."""
    return read_json_object(folder / CONFIG_FILE, _UNREADABLE)


def require_types(config: Mapping[str, Any], place: str) -> None:
    """Raise UserError naming the first known key of a LoRA's configuration whose value is of another type."""
    for key, kind in HARMLESS.items():
        if key in REQUIRED and key not in config:
            raise UserError(f"no {key}", place, f"write {kind.words} there")
        if key in config and not kind.holds(config[key]):
            raise UserError(f"{key} is {shown(config[key])}", place, f"write {kind.words} there")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            _require_regular(pattern, f"{place}, {key}")


def require_plain(config: Mapping[str, Any], place: str) -> None:
    """Raise UserError naming the key that makes an adapter more than LoRA on an unchanged base, or a value's type."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"peft_type {shown(config.get('peft_type'))} is not plain LoRA", place, _MORE)
    require_types(config, place)
    for key, value in config.items():
        if key not in HARMLESS and value:
            raise UserError(f"{key} {shown(value)} is not plain LoRA", place, _MORE)
    if config.get("bias", "none") not in ("none", None):
        raise UserError(f"bias {shown(config['bias'])} is not plain LoRA", place, _MORE)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in KEEP_THE_BASE:
        raise UserError(
            f"init_lora_weights {shown(init)}: the adapter belongs to a base whose weights it changed",
            place,
            _CONVERT if _is_lost(init) else _MORE,
        )


def require_repeatable(config: Mapping[str, Any], place: str) -> None:
    """Raise UserError where PEFT itself would load a LoRA as something else than what was trained, without a word."""
    require_types(config, place)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and _is_lost(init):
        raise UserError(
            f"init_lora_weights {shown(init)} changed the base's weights in a way that cannot be repeated",
            place,
            _CONVERT,
        )
    if config.get("alora_invocation_tokens"):
        raise UserError(
            "alora_invocation_tokens: the adapter acts on a part of each prompt only",
            place,
            "ask it with PEFT itself",
        )


def _is_lost(init: str) -> bool:
    """Whether a base was changed by chance or by data, so that PEFT cannot change it once more when it loads."""
    return init.lower().startswith(("pissa_niter", "corda", "lora_ga"))


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` gives a module, as PEFT 0.21 finds it (`get_pattern_key`)."""
    patterns = patterns or {}
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return patterns.get(name, default)


def require_bounded(config: Mapping[str, Any], names: Sequence[str], place: str) -> None:
    """Raise UserError where a regular expression of the configuration is none, or matching names takes for ever."""
    for key, wrap in _REGULAR.items():
        found = config.get(key)
        if isinstance(found, list) and key.endswith("_modules"):
            continue  # names, not expressions
        patterns = [found] if isinstance(found, str) else found if isinstance(found, (list, dict)) else []
        slow = [text for text in patterns if isinstance(text, str) and not PLAIN_PATTERN.fullmatch(text)]
        full_matches([wrap.format(text) for text in slow], names, f"{place}, {key}")


def _require_regular(pattern: str, place: str) -> None:
    if fault := pattern_fault(pattern):
        raise UserError(
            f"{shown(pattern)} is no regular expression: {fault}", place, "write a module's name there"
        )


def shown(value: Any) -> str:
    """A value of any type, in few characters."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of many digits"
    return text if len(text) <= 60 else f"{text[:57]}…"
