"""Models of random weights and records of real lengths: nothing to download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from launch.data.examples import IGNORED, Example

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "smollm2-layers": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 1024, "tie_word_embeddings": True,
    },
    "llama3-8b-layer": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 1024,
    },
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
"""`smollm2` is SmolLM2-135M's shape; `smollm2-layers` four of its layers, `llama3-8b-layer` one of LLaMA3-8B's, with a
small vocabulary."""

MEDIAN_LENGTH, SPREAD, ANSWER = 93, 0.27, 7
"""Commonsense prompts: 98 tokens on average, 7 of them the answer; 16 padded to the longest are 1.5 times as many."""


def random_model(
    shape: str, dtype: torch.dtype, attention: str, device: torch.device | None = None
) -> nn.Module:
    """A Llama of this shape with seeded random weights, frozen.

    Drawn on a CPU and converted; with `device` drawn there and in `dtype`: seconds for 8B parameters on a GPU.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, use_cache=False, attn_implementation=attention
    )
    if device is None:
        return LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    with device:
        drawn: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return drawn.requires_grad_(False)


def copy_sharing_weights(model: Any) -> nn.Module:
    """Another model of the same weights, which it shares: the contenders then read the same memory."""
    with torch.device("meta"):
        twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    for name, buffer in model.named_buffers():
        parent, _, leaf = name.rpartition(".")
        twin.get_submodule(parent)._buffers[leaf] = buffer
    frozen: nn.Module = twin.requires_grad_(False)
    return frozen


def records(count: int, vocabulary: int, *, train_on_inputs: bool, seed: int) -> list[Example]:
    """Seeded random tokens of the lengths of commonsense records."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.rint(MEDIAN_LENGTH * np.exp(SPREAD * rng.standard_normal(count))), 30, 256)
    made = []
    for number, length in enumerate(lengths.astype(int).tolist()):
        ids = rng.integers(1, vocabulary, length).tolist()
        masked = 0 if train_on_inputs else length - ANSWER
        made.append(Example(number, ids, [IGNORED] * masked + ids[masked:]))
    return made
