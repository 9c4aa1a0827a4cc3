"""An adapter of any kind attached to a model by PEFT itself; what PEFT would leave out without a word is refused."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flexlora_ds.base_model.source import ModelSource, fetch, one_line_errors
from flexlora_ds.errors import UserError
from flexlora_ds.files.reading import open_ordinary
from flexlora_ds.peft_format import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from flexlora_ds.peft_reading.config import (
    HARMLESS,
    pattern_value,
    read_config,
    require_bounded,
    require_repeatable,
    shown,
)
from flexlora_ds.peft_reading.idle import idle_lines
from flexlora_ds.terminal.plain_text import python_command

FAULTS = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    RuntimeError,
    OSError,
    AssertionError,
    ImportError,
    ArithmeticError,
    re.error,
    SafetensorError,
)
"""What PEFT raises for an adapter's contents: it checks few of their types itself."""
_CONVERTER = (
    "import sys, torch; from safetensors.torch import save_file; "
    "save_file(torch.load(sys.argv[1], 'cpu', weights_only=True), sys.argv[2])"
)
_SHARED = ("prompt_encoder", "vblora_vector_bank", ".tinylora_v.", ".unilora_theta_d.")
"""Parts of names that PEFT itself does not miss: tensors that it stores elsewhere, or not at all."""


_PLACED = ("prompt_embeddings",)
"""What PEFT puts into its place by itself, and then counts as unexpected: the tokens of a prompt or a prefix."""


def attach_adapter(model: Any, adapter: str) -> Any:
    """The model with a PEFT adapter, unmerged.

    Args:
        adapter: a folder, or an id of the hub.

    Raises:
        UserError: no adapter; one that PEFT cannot load on this model; or one that it would load in part only.
    """
    folder = adapter_folder(adapter)
    config, place = read_config(folder), str(folder / CONFIG_FILE)
    _require_known(config, place)
    if config.get("peft_type") == "LORA":
        require_repeatable(config, place)
    require_bounded(config, [name for name, _ in model.named_modules()], place)
    if config.get("peft_type") == "LORA":
        _require_ranks(config, folder / WEIGHTS_FILE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted, missing, left_out = _load(model, folder, config)
    for keys, what in ((missing, "holds nothing for"), (left_out, "has no place for")):
        if keys:
            where = "the adapter" if keys is missing else "the model"
            raise UserError(f"{where} {what} {keys[0]}{_more(keys)}", f"--adapter {adapter}", _remedy(config))
    return adapted


def doubts_of(adapted: Any) -> tuple[str, ...]:
    """What the configuration of an attached adapter says to no effect."""
    tuner = adapted.base_model
    names = [*getattr(tuner, "targeted_module_names", ()), *getattr(tuner, "targeted_parameter_names", ())]
    return idle_lines(vars(adapted.active_peft_config), names, CONFIG_FILE)


def _load(model: Any, folder: Path, config: Mapping[str, Any]) -> tuple[Any, list[str], list[str]]:
    """The adapted model; the names that the adapter lacks, and those of it that the model lacks."""
    from peft import PeftModel

    names = getattr(model, "_checkpoint_conversion_mapping", {})
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        _restore_size(adapted)
        # Once more, for what it says: from_pretrained keeps to itself which tensors found no place.
        result = adapted.load_adapter(str(folder), adapted.active_adapter, key_mapping=names)
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        raise _mismatch(model, folder, config, error) from error
    missing = [key for key in result.missing_keys if not any(part in key for part in _SHARED)]
    return adapted, missing, [key for key in result.unexpected_keys if key not in _PLACED]


def _restore_size(adapted: Any) -> None:
    """Give AdaLoRA's layers the size that they begin with, which every loading cuts to the ranks of the adapter."""
    from peft.tuners.adalora import AdaLoraLayer

    config = adapted.active_peft_config
    for layer in adapted.modules():
        if isinstance(layer, AdaLoraLayer):
            layer.update_layer(adapted.active_adapter, config.init_r, config.lora_alpha, config=config)


def adapter_folder(adapter: str, place: str = "--adapter") -> Path:
    """Where an adapter lies, fetched if it is an id of the hub; its weights are safetensors. UserError if not.

    `place` names the option for messages.
    """
    folder = Path(adapter)
    if folder.is_dir() and not (folder / CONFIG_FILE).exists():
        raise UserError(
            f"no {CONFIG_FILE} in {folder}", place, "give the folder that holds it, e.g. RUN/adapter"
        )
    if not folder.is_dir() and (folder.is_absolute() or adapter.count("/") != 1 or adapter.startswith(".")):
        raise UserError(f"no adapter folder {adapter}", place, "train one, or give a hub id")
    source = ModelSource(adapter, adapter, local=folder.is_dir())
    with one_line_errors(source, "adapter"):
        folder = fetch(source, "model")
    if not (folder / WEIGHTS_FILE).exists():
        raise _without_safetensors(adapter, folder, place)
    return folder


def _without_safetensors(adapter: str, folder: Path, place: str) -> UserError:
    pickled = folder / "adapter_model.bin"
    if not pickled.is_file():
        return UserError(f"no {WEIGHTS_FILE} in {folder}", place, "fetch the adapter again")
    return UserError(
        f"adapter {adapter} has pickled weights, which are never read: only safetensors are",
        pickled.name,
        f"convert them once: {python_command(_CONVERTER, pickled, folder / WEIGHTS_FILE)}",
    )


def _require_known(config: Mapping[str, Any], place: str) -> None:
    """Refuse what PEFT would ignore: it warns of keys that it does not know, and goes on."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = config.get("peft_type")
    settings = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if settings is None:
        raise UserError(f"peft_type {shown(kind)} is not known to PEFT", place, "install a newer peft")
    for key, value in config.items():
        if value and key not in settings.__dataclass_fields__ and key not in HARMLESS:
            raise UserError(
                f"{key} {shown(value)} is not known to PEFT",
                place,
                "install the peft it was made with",
            )


def _require_ranks(config: Mapping[str, Any], path: Path) -> None:
    """PEFT makes matrices as large as the configuration says before it looks at the stored ones."""
    open_ordinary(path).close()
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot be read: {error}", str(path), "write it again") from None
    if not shapes:
        raise UserError("no tensors", str(path), "write it again")
    for key, shape in shapes.items():
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        rank = pattern_value(config.get("rank_pattern"), name, config["r"])
        # A multiple where one tensor holds the matrices of all experts.
        if key.endswith(".lora_A.weight") and (not shape or shape[0] % rank):
            raise UserError(
                f"{key} is {shape}, and {CONFIG_FILE} says rank {rank}", str(path), "write it again"
            )


def _mismatch(model: Any, folder: Path, config: Mapping[str, Any], error: Exception) -> UserError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    detail = next((line for line in lines if "size mismatch" in line), lines[0])
    name = getattr(model.config, "name_or_path", "")
    fault = f"the adapter does not fit {name!r}: {detail[:300]}"
    return UserError(fault, f"--adapter {folder}", _remedy(config))


def _remedy(config: Mapping[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    return f"it was trained on {json.dumps(base)}" if base else "give the model it was trained on"


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""
