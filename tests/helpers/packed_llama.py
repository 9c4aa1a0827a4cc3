"""Eight examples of unequal length, padded or packed, and a small adapted model to run them through."""

from __future__ import annotations

from typing import Any

import torch

from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters
from launch.data.batches import ProcessShare, TrainingBatches
from tests.helpers.numbered_examples import make_examples

LENGTHS = [9, 3, 17, 1, 8, 12, 5, 16]
PAD = 7
DEVICE = torch.device("cpu")


def batches_of_eight(
    padding_free: bool, micro: int = 8, label_starts: list[int] | None = None
) -> TrainingBatches:
    """The eight examples in one global batch, in micro-batches of `micro`."""
    starts = label_starts or [size // 2 for size in LENGTHS]
    examples = make_examples(LENGTHS, starts)
    return TrainingBatches(examples, 8, 42, ProcessShare(1, 0, micro), PAD, padding_free=padding_free)


def adapted_model(attention: str, window: int | None = None) -> Any:
    """A tiny Llama, or a Mistral with a sliding window, with adapters that have something to say and drop."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256, "attn_implementation": attention,
    }  # fmt: skip
    kind = (MistralConfig, MistralForCausalLM) if window else (LlamaConfig, LlamaForCausalLM)
    model: Any = kind[1](kind[0](**shape, **({"sliding_window": window} if window else {}))).train()
    inject_adapters(model, FlexLoRAConfig(rank=4, dropout=0.2, target_modules=("all-linear",)))
    rng = torch.Generator().manual_seed(5)
    for layer in adapters(model).values():
        layer.lam.data.copy_(torch.randn(4, generator=rng))
    return model
