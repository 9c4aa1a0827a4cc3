"""The frozen model that the sections measure on."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.shapes import SHAPES, random_model
from launch.model.attention import torch_varlen
from launch.model.packed_attention import register_packed_sdpa, register_packed_varlen


def build_base(shape: str, device: torch.device, *, tiny: bool = False) -> Any:
    """Random weights on the device: bf16 on a GPU, fp32 on a CPU, with an attention that serves packed batches."""
    dtype = torch.float32 if tiny and device.type == "cpu" else torch.bfloat16
    return random_model(shape, dtype, packed_attention(device), device)


def packed_attention(device: torch.device) -> str:
    """What a run without flash-attn takes for packed examples; padded ones get transformers' sdpa under either."""
    varlen = torch_varlen("bf16") if device.type == "cuda" else None
    return register_packed_sdpa() if varlen is None else register_packed_varlen(varlen)


def layer_parameters(shape: str) -> int:
    """Weights of the linear layers of all decoder layers: embeddings and head left out."""
    s = SHAPES[shape]
    head = s["hidden_size"] // s["num_attention_heads"]
    attention = s["hidden_size"] * head * (2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"])
    return int(s["num_hidden_layers"] * (attention + 3 * s["hidden_size"] * s["intermediate_size"]))
