"""A merged model: from its base's files where they hold its tensors one to one, else through the whole model."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from flexlora_ds.base_model.blueprint import StoredModel
from flexlora_ds.base_model.loading import load_causal_lm, load_tokenizer, native_dtype
from flexlora_ds.base_model.source import locate
from flexlora_ds.exports.checks import (
    Check,
    check_merged,
    check_merged_logits,
    logits_check,
    source_logits,
)
from flexlora_ds.exports.merging import merge
from flexlora_ds.exports.probe import probe_logits
from flexlora_ds.exports.shard_merge import ShardedBase
from flexlora_ds.exports.streamed_model import streamed_model
from flexlora_ds.files.folders import replacing_folder, require_new
from flexlora_ds.partitions.host_memory import returning_large_blocks
from flexlora_ds.peft_format import LoraAdapter, require_finite_adapter, write_prompt_note


def export_merged(
    adapter: LoraAdapter, out: Path, base: str | None = None, dtype: torch.dtype | None = None
) -> tuple[Check, Check]:
    """Write base + ΔW as a plain model with its tokenizer; check every tensor, and the logits against PEFT's.

    `prompt.json` goes with it, so that an evaluation asks the model as it would ask the adapter.

    ΔW is added in fp32 and rounded once to `dtype` (default: the base's own; fp32 for a GGUF). `base` replaces the name
    recorded in the adapter, for a model that has moved. It goes through the base's files, and holds rows of a weight
    and single layers. Where other weights are converted while they load, one model is in memory for the check; two
    are where the files are no safetensors, the weights are quantised, or an adapted one is shared.

    Raises:
        UserError: the adapter does not fit the base, or changes a weight that other layers share; `out` holds
            anything, of which a model's files would become a part.
        RunError: a check found a difference; `out` is left as it was.
    """
    require_new(out, "folder")
    require_finite_adapter(adapter, str(out))
    name = base or adapter.base_model
    dtype = dtype or native_dtype(name, adapter.revision)
    # What is freed goes back: else the heap's holes, of a size that varies, come on top of a model's layers.
    with returning_large_blocks(), replacing_folder(out) as fresh:
        sharded = ShardedBase.of(name, adapter, dtype)
        load_tokenizer(name, adapter.revision).save_pretrained(fresh)
        write_prompt_note(fresh, adapter)
        if sharded is not None:
            checks = _merge_in_shards(sharded, adapter, fresh, dtype, out)
        else:
            checks = _merge_whole(name, adapter, fresh, dtype)
        for check in checks:
            check.require(out)
    return checks


def _merge_in_shards(
    sharded: ShardedBase, adapter: LoraAdapter, fresh: Path, dtype: torch.dtype, out: Path
) -> tuple[Check, Check]:
    sharded.merge(fresh, dtype)
    tensors = sharded.check(fresh, dtype)
    tensors.require(out)  # only what is whole can be read as a model
    logits = _streamed_logits(sharded, adapter, fresh, dtype)
    if logits is None or not math.isfinite(logits.figure):  # layers that read each other's weights
        logits = _whole_logits(sharded.source.name, adapter, fresh, dtype)
    return tensors, logits


def _streamed_logits(
    sharded: ShardedBase, adapter: LoraAdapter, fresh: Path, dtype: torch.dtype
) -> Check | None:
    """None where weights are converted while they load."""
    merged = StoredModel(locate(fresh), dtype)
    places = merged.places()
    if sharded.places is None or places is None:
        return None
    before = streamed_model(sharded.source, sharded.stored, sharded.places, dtype)
    expected = source_logits(before, adapter)
    after = streamed_model(locate(fresh), merged, places, dtype)
    return logits_check(probe_logits(after), expected, dtype)


def _whole_logits(name: str, adapter: LoraAdapter, fresh: Path, dtype: torch.dtype) -> Check:
    """With one of the two models in memory at a time."""
    before = load_causal_lm(name, dtype=dtype, revision=adapter.revision)
    expected = source_logits(before, adapter)
    del before
    return logits_check(probe_logits(load_causal_lm(fresh, dtype=dtype)), expected, dtype)


def _merge_whole(name: str, adapter: LoraAdapter, fresh: Path, dtype: torch.dtype) -> tuple[Check, Check]:
    model = load_causal_lm(name, dtype=dtype, revision=adapter.revision)
    merge(model, adapter)
    model.save_pretrained(fresh)
    del model
    before = load_causal_lm(name, dtype=dtype, revision=adapter.revision)
    after = load_causal_lm(fresh, dtype=dtype)
    return check_merged(before, after, adapter, dtype), check_merged_logits(before, after, adapter, dtype)
