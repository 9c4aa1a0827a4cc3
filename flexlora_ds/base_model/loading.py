"""Load a base model and its tokenizer from the hub, a local folder or a `.gguf` file.

transformers is imported when a function is called; DeepSpeed only for `zero3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexlora_ds.base_model.blueprint import StoredModel, blueprint, build, read_config
from flexlora_ds.base_model.model_folder import has_weights, model_folder
from flexlora_ds.base_model.source import ModelSource, locate, one_line_errors
from flexlora_ds.base_model.stored_names import tie
from flexlora_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Special tokens that vocabularies set aside for padding, or never use in text, best first.
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|endoftext|>")


def load_causal_lm(
    model: str | Path,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    zero3: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal language model with all weights in `dtype`, in evaluation mode.

    `model` is a hub id, a local folder with safetensors, or a `.gguf` file (loaded dequantised, so that it
    trains, merges and saves like any other). `attention` is transformers' name: `sdpa`, `eager`,
    `flash_attention_2`; None is sdpa where the model has it, else eager. Pickled weights (`.bin`) are
    refused. Raises UserError where the model is missing, gated, damaged or incomplete.

    `zero3` is the DeepSpeed configuration of a stage-3 run: the parameters come partitioned over all
    processes (each of which must call), and `device` is DeepSpeed's choice. See
    `flexlora_ds.partitions.loading`.
    """
    source = locate(model, revision)
    with one_line_errors(source, "model"):
        if source.gguf_file is not None:
            loaded = _load_whole(source, model_folder(source, "model"), dtype, attention, device)
            return loaded if zero3 is None else _partitioned(loaded, dtype, zero3)
        stored = StoredModel(source, dtype)
        if zero3 is None:
            return _load_whole(source, stored.folder, dtype, attention, device)
        return _load_into_partitions(source, stored, dtype, attention, zero3)


def _load_into_partitions(
    source: ModelSource,
    stored: StoredModel,
    dtype: torch.dtype,
    attention: str | None,
    zero3: Mapping[str, Any],
) -> PreTrainedModel:
    """Straight into the partitions where the stored tensors are one to one the model's, else through a whole model."""
    from flexlora_ds.partitions import loading

    loading.require_same_dtype(dtype, zero3)
    places = stored.places()
    if places is not None:
        read, untied = places.names, places.untied
        model = loading.load_partitioned(
            {path: {n: read[n] for n in names if n in read} for path, names in stored.shards.items()},
            build=lambda: tie(build(stored.config, dtype, attention), untied),
            zero3=zero3,
        )
        if model is not None:
            return model
    return _partitioned(_load_whole(source, stored.folder, dtype, attention, None), dtype, zero3)


def _partitioned(model: PreTrainedModel, dtype: torch.dtype, zero3: Mapping[str, Any]) -> PreTrainedModel:
    from flexlora_ds.partitions import loading

    loading.require_same_dtype(dtype, zero3)
    return loading.partition(model, dtype, zero3)


def load_skeleton(model: str | Path, revision: str | None = None) -> PreTrainedModel:
    """The model's modules on the meta device: shapes and configuration without weights.

    Raises UserError as `load_causal_lm` does.
    """
    source = locate(model, revision)
    with one_line_errors(source, "model"):
        folder = model_folder(source, "tokenizer")
        config = read_config(source, folder)
        if source.local and source.gguf_file is None and has_weights(folder):
            StoredModel(source, config.dtype or torch.float32)
        return blueprint(source.name, config)


def load_tokenizer(model: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer with a pad token that never stands for text; padding side as its author set it.

    Raises UserError as `load_causal_lm` does.
    """
    from transformers import AutoTokenizer

    source = locate(model, revision)
    with one_line_errors(source, "tokenizer"):
        folder = model_folder(source, "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **_gguf_argument(source))
    _resolve_pad_token(tokenizer, source.name)
    return tokenizer


def native_dtype(model: str | Path, revision: str | None = None) -> torch.dtype:
    """The dtype a model's author saved it in; fp32 for a GGUF file and where none is recorded."""
    source = locate(model, revision)
    if source.gguf_file is not None:
        return torch.float32
    with one_line_errors(source, "model"):
        dtype = read_config(source, model_folder(source, "model")).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _gguf_argument(source: ModelSource) -> dict[str, Any]:
    return {} if source.gguf_file is None else {"gguf_file": source.gguf_file}


def _load_whole(
    source: ModelSource,
    folder: Path,
    dtype: torch.dtype,
    attention: str | None,
    device: torch.device | str | None,
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GgufConfig

    arguments: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention,
        **_gguf_argument(source),
    }
    if source.gguf_file is None:
        arguments["use_safetensors"] = True
    else:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    if device is not None and torch.device(device).type != "cpu":
        arguments["device_map"] = {"": device}
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False, **arguments
    )
    require_complete(source, report["missing_keys"])
    if source.gguf_file is not None:
        _forget_quantization(loaded)
    return loaded


def require_complete(source: ModelSource, missing: set[str] | list[str]) -> None:
    """Raise UserError if weights are missing: transformers would draw them at random and only warn."""
    if missing:
        some = ", ".join(sorted(missing)[:3]) + (", …" if len(missing) > 3 else "")
        raise UserError(f"model {source.name} lacks {len(missing)} of its weights", some, "fetch it again")


def _forget_quantization(model: Any) -> None:
    """Make a dequantised model a plain one: with the GGUF loader's marks it refuses to train and to save."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _resolve_pad_token(tokenizer: Any, name: str) -> None:
    """Keep a pad token that is special; else take a special token made for padding, else the end token.

    Older scripts pad with id 0, which in several vocabularies is a real word ('!' in Llama 3's).
    """
    special = set(tokenizer.all_special_tokens) | {
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    if tokenizer.pad_token in special:
        return
    choices = [token for token in _PAD_TOKENS if token in special and token != tokenizer.bos_token]
    pad = next(iter(choices), None) or tokenizer.eos_token or tokenizer.unk_token
    if pad is None:
        raise UserError(f"the tokenizer of {name} has no pad, end or unknown token", mend="add one to it")
    tokenizer.pad_token = pad
