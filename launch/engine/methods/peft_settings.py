"""The file of `method: peft`, read and checked: the format is that of PEFT's own `adapter_config.json`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexlora_ds.errors import UserError
from flexlora_ds.fields import nearest
from flexlora_ds.files.reading import read_json_object
from flexlora_ds.peft_reading.attach import FAULTS
from flexlora_ds.peft_reading.config import shown
from launch.options.train_options import TrainOptions

if TYPE_CHECKING:
    from peft import PeftConfig

OF_AN_ADAPTER = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)
"""Keys that say what an adapter is or was made with, and nothing of how one is trained."""
_ELSEWHERE: Mapping[str, str] = {
    "ADALORA": "choose method adalora, which calls its allocator",
    "POLY": "choose a kind that asks for no task with each record",
    "XLORA": "choose a kind that needs no adapters of others",
    "ADAPTION_PROMPT": "choose a kind that adapts layers",
    "SHADOW": "choose a kind that adapts layers",
}
"""What to do instead of a kind that this loop cannot train."""
START_OF_ITS_OWN: Mapping[str, str] = {
    "pissa": "choose method pissa",
    "olora": "choose method olora",
    "lora_ga": "choose method lora_ga",
    "corda": "prepare such an adapter with PEFT itself",
    "eva": "prepare such an adapter with PEFT itself",
    "loftq": "choose true",
}
"""What to do instead of a LoRA's start that looks at data, or changes the base; by how its name begins."""


def read_peft_config(options: TrainOptions) -> PeftConfig:
    """PEFT's configuration of the file that `peft_config` names.

    Raises:
        UserError: no file is named, it is none, PEFT does not know its kind or one of its keys, a value is not allowed,
            or the kind cannot be trained in this loop.
    """
    if options.peft_config is None:
        raise UserError(
            "method peft needs peft_config",
            options.place("method"),
            "name a file as PEFT's adapter_config.json",
        )
    path = Path(options.peft_config)
    values = read_json_object(path, "write one as PEFT's adapter_config.json")
    kind = _known_kind(values, str(path))
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"task_type {shown(values['task_type'])}", str(path), "leave it out: it is CAUSAL_LM")
    settings = {key: value for key, value in values.items() if key not in OF_AN_ADAPTER}
    _require_known(settings, list(kind.__dataclass_fields__), str(path))
    with peft_faults(str(path)):
        config: PeftConfig = kind(**settings, task_type="CAUSAL_LM")
    _require_trainable(config, str(path))
    return config


def _known_kind(values: Mapping[str, Any], place: str) -> Any:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    given = values.get("peft_type")
    if not isinstance(given, str) or given not in known:
        close = nearest(given, [kind.lower() for kind in known]) if isinstance(given, str) else None
        todo = f"did you mean {close.upper()}?" if close else f"give one of {', '.join(sorted(known))}"
        what = f"peft_type {shown(given)} is not known to PEFT" if "peft_type" in values else "no peft_type"
        raise UserError(what, place, todo)
    return known[given]


def _require_known(settings: Mapping[str, Any], known: list[str], place: str) -> None:
    for key in settings:
        if key not in known:
            close = nearest(key, known)
            todo = f"did you mean {close}?" if close else "leave it out, or install the peft that knows it"
            raise UserError(f"{shown(key)} is not known to PEFT", place, todo)


def _require_trainable(config: Any, place: str) -> None:
    kind = str(config.peft_type.value)
    if config.is_prompt_learning or kind in _ELSEWHERE:
        todo = _ELSEWHERE.get(
            kind, "choose one that adapts layers: virtual tokens do not go with packed records"
        )
        raise UserError(f"peft_type {kind} cannot be trained here", place, todo)
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str):
        for word, todo in START_OF_ITS_OWN.items():
            if init.lower().startswith(word):
                raise UserError(f"init_lora_weights {shown(init)} is more than a file can say", place, todo)


@contextmanager
def peft_faults(place: str) -> Iterator[None]:
    """What PEFT raises for a configuration, as one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except FAULTS as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"PEFT cannot make this adapter: {lines[0][:300]}", place, "correct the file"
        ) from error
