"""Read a plain LoRA in PEFT's format: ours, or one that PEFT trained."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flexlora_ds.errors import UserError
from flexlora_ds.files.reading import open_ordinary, read_json_object
from flexlora_ds.peft_format import (
    CONFIG_FILE,
    METHOD_FILE,
    PREFIX,
    PROMPT_FILE,
    WEIGHTS_FILE,
    LoraAdapter,
    LoraMatrix,
)
from flexlora_ds.peft_reading.config import pattern_value, read_config, require_bounded, require_plain
from flexlora_ds.peft_reading.idle import idle_lines

_NAME = re.compile(rf"{re.escape(PREFIX)}(.+)\.(lora_A|lora_B|base_layer)\.weight")
_AGAIN = "write it again"


def read_peft_adapter(folder: Path) -> LoraAdapter:
    """The adapter in a folder; each matrix as PEFT means it, whichever way round its layer stores the weight.

    Raises:
        UserError: a file is missing or damaged, or the adapter is more than LoRA on linear layers of an unchanged base.
    """
    config = read_config(folder)
    require_plain(config, str(folder / CONFIG_FILE))
    matrices, base_weights = _matrices(
        config, read_tensors(folder / WEIGHTS_FILE), str(folder / WEIGHTS_FILE)
    )
    doubts = idle_lines(config, list(matrices), str(folder / CONFIG_FILE))
    return LoraAdapter(
        matrices,
        base_model=config.get("base_model_name_or_path") or "",
        revision=config.get("revision"),
        default_rank=config["r"],
        default_alpha=float(config["lora_alpha"]),
        dropout=config.get("lora_dropout") or 0.0,
        notes=_read_beside(folder / METHOD_FILE),
        prompt=_text_beside(folder / PROMPT_FILE, "prompt"),
        prompt_date=_text_beside(folder / PROMPT_FILE, "date"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        base_weights=base_weights,
        folder=folder,
        doubts=doubts,
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; UserError where it is missing or damaged."""
    open_ordinary(path, "give a folder with an adapter in it").close()
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot be read: {error}", str(path), _AGAIN) from None
    return tensors


def _read_beside(path: Path) -> dict[str, Any]:
    """The object in a file that may be absent."""
    return read_json_object(path, "write it again, or remove it") if path.exists() else {}


def _text_beside(path: Path, key: str) -> str | None:
    text = _read_beside(path).get(key)
    if text is not None and not isinstance(text, str):
        raise UserError(f"the {key} is no text", str(path), "write it again, or remove it")
    return text


def _matrices(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], place: str
) -> tuple[dict[str, LoraMatrix], dict[str, Tensor]]:
    """The pairs of A and B by module name; and the weights of the base that PEFT stored once more."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name = _NAME.fullmatch(key)
        if name is None:
            raise UserError(
                f"the tensor {key} is not of a plain LoRA", place, "merge it into its base with PEFT itself"
            )
        if not tensor.is_floating_point() or tensor.dim() != 2:
            kind = f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
            raise UserError(f"the tensor {key} is {kind}, no matrix of real numbers", place, _AGAIN)
        found.setdefault(name[1], {})[name[2]] = tensor
    if not found:
        raise UserError("no tensors", place, _AGAIN)
    require_bounded(config, list(found), CONFIG_FILE)
    matrices = {name: _matrix(config, name, parts, place) for name, parts in found.items()}
    return matrices, {name: parts["base_layer"] for name, parts in found.items() if "base_layer" in parts}


def _matrix(config: Mapping[str, Any], name: str, parts: Mapping[str, Tensor], place: str) -> LoraMatrix:
    A, B = parts.get("lora_A"), parts.get("lora_B")
    if A is None or B is None:
        raise UserError(f"{name} has no {'lora_A' if A is None else 'lora_B'}", place, _AGAIN)
    rank = pattern_value(config.get("rank_pattern"), name, config["r"])
    if A.shape[0] != rank or B.shape[1] != rank:
        shapes = f"{list(B.shape)} and {list(A.shape)}"
        raise UserError(f"B and A of {name} are {shapes}, and {CONFIG_FILE} says rank {rank}", place, _AGAIN)
    if not B.numel() or not A.numel():
        raise UserError(f"B or A of {name} is empty", place, _AGAIN)
    alpha = pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraMatrix(B, A, float(scale))
