"""The interface to any causal language model: padded token rows in, the last logits out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from eval.model.last_layer import LastLayer, agrees
from flexlora_ds.base_model.vocabulary import Vocabulary


class LanguageModel:
    """A model (with or without a PEFT adapter) and its tokenizer, ready to answer.

    `pad_id` fills masked positions only, so any id of the vocabulary will do. `stop_ids` end an answer.
    `context` is the number of positions the model has (None: no limit). `own_loop`: its cache is plain keys and
    values, which rows may share and leave early; other models use transformers' `generate`. `unpadded_only`: rows
    must not be padded, because prompt-learning adapters put virtual tokens before the padding and ignore positions.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        call: Callable[..., Any] | None = None,
        device: torch.device | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """`call`, `device` and `vocabulary` are for a model that is trained: it may be called through an engine, its
        weights may be elsewhere, and nothing is attached to it.
        """
        self.model = model.eval()
        self._call = call or model
        self.tokenizer = tokenizer
        self.effect: str | None = None
        """What is to be said of its adapter (`eval.model.effect`)."""
        self.doubts: tuple[str, ...] = ()
        """What its adapter's configuration says to no effect."""
        self.device = device or next(model.parameters()).device
        self.config = model.config.get_text_config(decoder=True)
        self.context: int | None = getattr(self.config, "max_position_embeddings", None)
        self.stop_ids = _stop_ids(model, tokenizer)
        self.vocabulary = vocabulary or Vocabulary.of(model)
        self.pad_id = self.vocabulary.padding_id(tokenizer)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._accepts = frozenset(inspect.signature(base.forward).parameters)
        peft_config = getattr(model, "active_peft_config", None)
        self.unpadded_only = bool(getattr(peft_config, "is_prompt_learning", False))
        plain = "position_ids" in self._accepts and _has_plain_cache(model.config)
        self.own_loop = plain and not self.unpadded_only
        self._last_layer = self._try_last_layer() if self.own_loop and call is None else None

    def _try_last_layer(self) -> LastLayer | None:
        last_layer = LastLayer(self.model)
        rng = torch.Generator().manual_seed(0)
        probe = torch.randint(0, self.vocabulary.inputs, (3, 5), generator=rng).to(self.device)
        if last_layer.modules and agrees(self.compute, last_layer, probe):
            return last_layer
        last_layer.remove()
        return None

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        *,
        cache: Any = None,
        use_cache: bool = False,
        keep: int = 1,
    ) -> tuple[Tensor, Any]:
        """Logits of the last `keep` columns, fp32 [rows, keep, vocabulary]; the cache, if `use_cache`.

        `ids` and `positions` [rows, new tokens]; `mask` [rows, cached + new tokens], 0 at padding.
        """
        logits, cache = self.compute(
            ids, mask, positions, cache=cache, use_cache=use_cache, keep=keep, narrowing=self._last_layer
        )
        return logits.float(), cache

    def compute(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        *,
        cache: Any = None,
        use_cache: bool = False,
        keep: int = 1,
        narrowing: LastLayer | None = None,
    ) -> tuple[Tensor, Any]:
        """`forward` in the model's dtype, with its last layer narrowed or whole."""
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "use_cache": use_cache or cache is not None,
        }
        if "position_ids" in self._accepts and not self.unpadded_only:
            arguments["position_ids"] = positions
        if cache is not None:
            arguments["past_key_values"] = cache
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = keep
        narrow = narrowing is not None and keep < ids.shape[1]
        with narrowing.only(keep) if narrow else nullcontext():  # type: ignore[union-attr]
            out = self._call(**arguments)
        return out.logits[:, -keep:], out.past_key_values if use_cache else None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, without special ones."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def free_positions(self, prompt: Sequence[int]) -> int | None:
        """How many tokens fit after a prompt; None: any number."""
        return None if self.context is None else self.context - len(prompt)

    @property
    def bytes_per_token(self) -> int:
        """An upper estimate of a batch's memory per token: cache, activations, share of logits."""
        config, size = self.config, int(next(self.model.parameters()).element_size())
        hidden = int(config.hidden_size)
        heads = int(config.num_attention_heads)
        kv_width: int = int(getattr(config, "num_key_value_heads", None) or heads) * (
            int(getattr(config, "head_dim", None) or hidden // heads)
        )
        cache: int = 2 * 2 * int(config.num_hidden_layers) * kv_width * size  # twice: growing copies it
        activations = (8 * hidden + 4 * int(getattr(config, "intermediate_size", None) or 4 * hidden)) * size
        logits = int(config.vocab_size) * (size + 4)  # in two copies, of fewer than every fourth column
        return cache + activations + logits // 4


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update(value if isinstance(value, (list, tuple)) else () if value is None else (value,))
    return frozenset(found)


def _has_plain_cache(config: Any) -> bool:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, ValueError):  # state-space and other architectures without such a cache
        return False
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
