"""Loading any causal language model, any PEFT adapter and its prompt style."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from data_prep.chat_template import as_day
from data_prep.prompt import PROMPTS
from eval.model.effect import effect_of, probe
from eval.model.language_model import LanguageModel
from eval.model.merging import merge_adapter
from eval.options import Options
from flexlora_ds.base_model.attention_support import supported_attention
from flexlora_ds.base_model.fingerprint import other_base_doubt
from flexlora_ds.base_model.loading import load_causal_lm, load_skeleton, load_tokenizer
from flexlora_ds.base_model.precision import TORCH_DTYPES, resolve_dtype
from flexlora_ds.errors import UserError
from flexlora_ds.files.reading import read_json_object
from flexlora_ds.peft_format import PROMPT_FILE
from flexlora_ds.peft_reading.attach import adapter_folder, attach_adapter, doubts_of
from flexlora_ds.peft_reading.config import read_config


def resolve_attention(name: str, dtype: torch.dtype, device: torch.device, supported: Collection[str]) -> str:
    """`auto` is flash attention where it is installed and supported, PyTorch's own where the model has it, else eager.

    Args:
        name: as asked for, transformers' names.
        supported: what the model's class has.

    Raises:
        UserError: the model, or this machine, has not what was asked for.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    if name != "auto":
        if name not in supported:
            have = ", ".join(sorted(supported))
            raise UserError(
                f"this model has no attention {name}", "--attention", f"choose auto or one of {have}"
            )
        if name == "flash_attention_2" and not (installed and device.type == "cuda"):
            raise UserError(
                f"attention {name} needs a GPU and the package flash-attn",
                "--attention",
                "install flash-attn or choose auto",
            )
        return name
    can_flash = device.type == "cuda" and dtype != torch.float32 and installed
    if can_flash and "flash_attention_2" in supported:
        return "flash_attention_2"
    return "sdpa" if "sdpa" in supported else "eager"


def load(options: Options, device: torch.device) -> LanguageModel:
    """The model on `device`, its adapter attached or merged. UserError names what is missing or does not fit."""
    dtype = TORCH_DTYPES[resolve_dtype(options.dtype, gpu=device.type == "cuda")]
    tokenizer = load_tokenizer(options.model)
    model: Any = load_causal_lm(
        options.model,
        dtype=dtype,
        attention=resolve_attention(
            options.attention, dtype, device, supported_attention(load_skeleton(options.model))
        ),
        device=device,
    )
    effect: str | None = None
    doubts: tuple[str, ...] = ()
    if options.adapter is not None:
        before = probe(model)
        model = attach_adapter(model, options.adapter)
        effect, doubts = effect_of(before, probe(model)), doubts_of(model)
        named = read_config(adapter_folder(options.adapter)).get("base_model_name_or_path")
        doubts += other_base_doubt(named, options.model)
        if options.merge:
            model = merge_adapter(model)
    elif options.merge:
        raise UserError(
            "nothing to merge without an adapter", "--merge", "give --adapter or leave --merge out"
        )
    lm = LanguageModel(model.to(device), tokenizer)
    lm.effect, lm.doubts = effect, doubts
    return lm


def recorded_prompt(trained: str | None) -> str | None:
    """The prompt style that a training run wrote beside its adapter or model (`prompt.json`), if it did."""
    path, said = _prompt_file(trained)
    if path is None:
        return None
    style = said.get("prompt")
    if not isinstance(style, str) or style not in PROMPTS:
        raise UserError(
            f"{path} names no known prompt style", mend='write {"prompt": "alpaca"} or "llm_adapters" there'
        )
    return style


def recorded_date(trained: str | None) -> str | None:
    """The date that the chat template was given in training, if it asked for one. UserError where it is no date."""
    path, said = _prompt_file(trained)
    if said.get("date") is None:
        return None
    day = as_day(said["date"])
    if day is None:
        raise UserError("the date is none", str(path), "write it as YYYY-MM-DD")
    return day


def _prompt_file(trained: str | None) -> tuple[Path | None, dict[str, Any]]:
    """The file in the folder of an adapter or model, and the object in it; None and empty where there is none."""
    path = Path(trained) / PROMPT_FILE if trained is not None else None
    if path is None or not path.exists():
        return None, {}
    return path, read_json_object(path, 'write {"prompt": "alpaca"} there, or the style of its training')


def resolve_prompt(requested: str, trained: str | None) -> tuple[str, str | None]:
    """The style to use, and a warning where it is another than `trained`, an adapter or a model, was trained with."""
    recorded = recorded_prompt(trained)
    if requested == "auto":
        return recorded or "alpaca", None
    if recorded is not None and recorded != requested:
        return requested, (
            f"it was trained with the prompt {recorded!r} and is asked with {requested!r}: "
            f"expect lower scores; --prompt auto uses the recorded one"
        )
    return requested, None
