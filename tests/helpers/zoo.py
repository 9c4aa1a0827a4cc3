"""Tiny random models of eighteen architectures, each chosen for a mechanism that another one lacks.

Weights, biases and norms are drawn wide, so that a wrong number anywhere shows in the logits. The tokenizer is that of
`tests.helpers.eval_tiny`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 420
_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_NARROW = {**_GROUPED, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2}

ZOO: dict[str, dict[str, Any]] = {
    # Biases in attention and MLP.
    "llama": {**_GROUPED, "attention_bias": True, "mlp_bias": True},
    # A head tied to the embeddings.
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},
    # Norms of queries and keys.
    "qwen3": {**_NARROW, "tie_word_embeddings": True},
    # A window of 16 tokens.
    "mistral": {**_GROUPED, "sliding_window": 16},
    # Embeddings multiplied by √hidden, norms that add one.
    "gemma": _NARROW,
    # Capped logits, a window in every second layer.
    "gemma2": {**_NARROW, "sliding_window": 16, "query_pre_attn_scalar": 8},
    # Two rotary bases.
    "gemma3_text": {**_NARROW, "sliding_window": 16, "query_pre_attn_scalar": 8},
    # A head with a bias, rotary embedding of half a head.
    "phi": _GROUPED,
    # Query, key and value in one matrix.
    "phi3": _GROUPED,
    # Stacked experts.
    "mixtral": {**_GROUPED, **_EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**_NARROW, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
    # Norms behind the blocks.
    "olmo2": _GROUPED,
    # Multipliers of embeddings, attention, residuals and logits.
    "granite": {
        **_GROUPED,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625,
    },
    # Layers without positions.
    "smollm3": _GROUPED,
    # A fused matrix ordered by heads, a parallel MLP, a head of another name.
    "gpt_neox": _SHAPE,
    # A fused matrix ordered by groups, linear layers of a class of its own.
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    # Learnt positions with an offset, counted from the mask; dropout of its own.
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 32,
    },
    # Weights stored the other way round (Conv1D), no linear layer but the head; dropout of its own.
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
    },
}
"""transformers' configurations by their model type."""


def make_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model in fp32, in evaluation mode; `changes` are keys of its configuration, all if `kind` is not in `ZOO`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **{**ids, "initializer_range": 0.15, **ZOO.get(kind, {}), **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.15 * torch.randn(p.shape, generator=rng))
    return model.eval()


def write_model(folder: Path, kind: str, seed: int = 0, **changes: Any) -> Path:
    """A model of the zoo and its tokenizer, as `from_pretrained` takes them."""
    from tests.helpers.eval_tiny import make_tokenizer

    make_model(kind, seed, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
