"""Loading any causal language model, any PEFT adapter and its prompt style."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from data_prep.prompt import PROMPTS
from eval.model.language_model import LanguageModel
from eval.model.merging import merge_adapter
from eval.options import Options
from flexlora_ds.base_model.loading import load_causal_lm, load_tokenizer
from flexlora_ds.base_model.precision import TORCH_DTYPES, resolve_dtype
from flexlora_ds.base_model.source import ModelSource, fetch, one_line_errors
from flexlora_ds.errors import UserError


def resolve_attention(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """`auto` is flash attention where it is installed and supported, else PyTorch's own."""
    if name != "auto":
        return name
    can_flash = (
        device.type == "cuda"
        and dtype != torch.float32
        and importlib.util.find_spec("flash_attn") is not None
    )
    return "flash_attention_2" if can_flash else "sdpa"


def load(options: Options, device: torch.device) -> LanguageModel:
    """The model on `device`, its adapter attached or merged. UserError names what is missing or does not fit."""
    dtype = TORCH_DTYPES[resolve_dtype(options.dtype, gpu=device.type == "cuda")]
    tokenizer = load_tokenizer(options.model)
    model: Any = load_causal_lm(
        options.model,
        dtype=dtype,
        attention=resolve_attention(options.attention, dtype, device),
        device=device,
    )
    if options.adapter is not None:
        model = attach_adapter(model, options.adapter)
        if options.merge:
            model = merge_adapter(model)
    elif options.merge:
        raise UserError(
            "nothing to merge without an adapter", "--merge", "give --adapter or leave --merge out"
        )
    return LanguageModel(model.to(device), tokenizer)


def attach_adapter(model: Any, adapter: str) -> Any:
    """The model with a PEFT adapter; UserError where the adapter is missing or was made for another base."""
    from peft import PeftModel

    folder = _adapter_folder(adapter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(model, str(folder))
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise UserError(_mismatch(adapter, model, str(error))) from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise UserError(_mismatch(adapter, model, str(warning.message)))
    return adapted


def _adapter_folder(adapter: str) -> Path:
    """Where an adapter lies, fetched if it is a hub id; its weights are safetensors."""
    folder = Path(adapter)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"no adapter_config.json in {folder}",
            "--adapter",
            "give the folder that holds it, e.g. RUN/adapter",
        )
    if not folder.is_dir() and (folder.is_absolute() or adapter.count("/") != 1 or adapter.startswith(".")):
        raise UserError(f"no adapter folder {adapter}", "--adapter", "train one, or give a hub id")
    source = ModelSource(adapter, adapter, local=folder.is_dir())
    with one_line_errors(source, "adapter"):
        folder = fetch(source, "model")
    if not (folder / "adapter_model.safetensors").is_file():
        raise _without_safetensors(adapter, folder)
    return folder


def _without_safetensors(adapter: str, folder: Path) -> UserError:
    pickled = folder / "adapter_model.bin"
    if not pickled.is_file():
        return UserError(f"no adapter_model.safetensors in {folder}", "--adapter", "fetch the adapter again")
    return UserError(
        f"adapter {adapter} has pickled weights, which are never read: only safetensors are",
        pickled.name,
        'convert them once: python -c "import torch; from safetensors.torch import save_file as save; '
        f"save(torch.load('{pickled}', 'cpu', weights_only=True), '{folder}/adapter_model.safetensors')\"",
    )


def _mismatch(adapter: str, model: Any, fault: str) -> str:
    lines = [line.strip() for line in fault.splitlines() if line.strip()]
    detail = next((line for line in lines if "size mismatch" in line), lines[0] if lines else "unreadable")
    base = ""
    config = Path(adapter) / "adapter_config.json"
    if config.is_file():
        base = str(json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    remedy = f"it was trained on {base!r}" if base else "give the model it was trained on"
    name = model.config.name_or_path
    return f"the adapter does not fit {name!r}: {detail[:300]} (--adapter {adapter}); {remedy}"


def recorded_prompt(adapter: str | None) -> str | None:
    """The prompt style that the training run wrote next to the adapter (`prompt.json`), if it did."""
    path = Path(adapter) / "prompt.json" if adapter is not None else None
    if path is None or not path.is_file():
        return None
    try:
        style = json.loads(path.read_text(encoding="utf-8"))["prompt"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        style = None
    if style not in PROMPTS:
        raise UserError(
            f"{path} names no known prompt style", mend='write {"prompt": "alpaca"} or "llm_adapters" there'
        )
    return str(style)


def resolve_prompt(requested: str, adapter: str | None) -> tuple[str, str | None]:
    """The style to use, and a warning where it is another than the adapter was trained with."""
    recorded = recorded_prompt(adapter)
    if requested == "auto":
        return recorded or "alpaca", None
    if recorded is not None and recorded != requested:
        return requested, (
            f"the adapter was trained with the prompt {recorded!r} and is asked with {requested!r}: "
            f"expect lower scores; --prompt auto uses the recorded one"
        )
    return requested, None
