"""The logits of a few fixed tokens, by which two forms of one adapted model are compared.

The unmerged adapter is attached by PEFT itself. So what is compared with it shares neither its code nor its reading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexlora_ds.peft_reading.attach import attach_adapter

ROWS, TOKENS = 2, 24
"""Long enough for the short sliding windows of small models to matter."""


@torch.inference_mode()
def probe_logits(model: Any) -> Tensor:
    """Logits fp32 [ROWS, TOKENS, vocabulary] of random ids; the model is in evaluation mode afterwards."""
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (ROWS, TOKENS), generator=rng).to(next(model.parameters()).device)
    # A mask of ones, for the models that would otherwise take their padding id for padding.
    out = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits: Tensor = out.logits.float().cpu()
    return logits


def logits_apart(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """How far logits are from the expected ones, as a share of their norm, token by token; NaN counts as infinite.

    The worst token of fp32. In half precision the median one: rounding alone can send single tokens to other experts.
    """
    apart = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    figure = apart.max() if dtype == torch.float32 else apart.median()
    return float(figure.nan_to_num(float("inf")))


def most_apart(dtype: torch.dtype) -> float:
    """What rounding may add up to over the layers of a model in `dtype`, as a share of the logits' norm.

    Several times what twelve layers of wide random weights show: 2e-6 in fp32, 3e-3 in fp16, 3e-2 in bf16.
    """
    return {torch.float32: 1e-3, torch.float16: 2e-2}.get(dtype, 1e-1)


def adapted_logits(base: Any, folder: Path) -> Tensor:
    """`probe_logits` of a base model with the LoRA in `folder`, attached and taken off again by PEFT.

    Raises:
        UserError: PEFT cannot load the adapter on this base, or in part only.
    """
    adapted = attach_adapter(base, str(folder))
    logits = probe_logits(adapted)
    adapted.unload()
    return logits
