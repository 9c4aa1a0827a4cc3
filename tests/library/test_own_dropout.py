"""A frozen base draws nothing: in training it computes what it does in evaluation, whatever it drew before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flexlora_ds.base_model.own_dropout import own_dropout, turn_off_dropout
from tests.helpers.zoo import make_model

IDS = torch.arange(24).view(2, 12) % 400
BASES: list[tuple[str, dict[str, Any], str]] = [
    # By functions that read an attribute; whole layers left out.
    ("opt", {"dropout": 0.3, "attention_dropout": 0.2, "layerdrop": 0.5}, "sdpa"),
    # By modules, and inside the attention kernel.
    ("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.4}, "eager"),
    # By noise on what the experts get.
    ("mixtral", {"router_jitter_noise": 0.3, "attention_dropout": 0.2}, "sdpa"),
]
STARCODER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "residual_dropout": 0.3, "embedding_dropout": 0.2, "attention_dropout": 0.2,
}  # fmt: skip
MORE: list[tuple[str, dict[str, Any], str]] = [
    ("starcoder2", STARCODER, "sdpa"),
    ("phi", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3}, "sdpa"),
    ("falcon", {"hidden_dropout": 0.3, "attention_dropout": 0.3}, "sdpa"),
    ("gpt_neox", {"hidden_dropout": 0.3, "attention_dropout": 0.3}, "eager"),
    ("phi3", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3}, "eager"),
    ("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.4}, "sdpa"),
    ("granite", {"attention_dropout": 0.3}, "eager"),
    ("gemma2", {"attention_dropout": 0.3}, "eager"),
]


@pytest.mark.parametrize(
    ("kind", "changes", "attention"), [*BASES, *(pytest.param(*b, marks=pytest.mark.full) for b in MORE)]
)
def test_in_training_a_frozen_base_computes_what_it_evaluates_to(
    kind: str, changes: dict[str, Any], attention: str
) -> None:
    model = make_model(kind, **changes)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        expected = model(IDS).logits
        assert not torch.equal(model.train()(IDS).logits, expected), "it draws nothing anyway"
        assert set(own_dropout(model).values()) <= set(changes.values())
        turn_off_dropout(model)
        model.eval().train()
        assert torch.equal(model(IDS).logits, expected)
    assert own_dropout(model) == {}


def test_what_is_read_from_the_configuration_is_off_too() -> None:
    """Of the model and of the text model inside it."""

    class Reading(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.dropout_every = 3
            self.drop_tokens = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, self.config.text_config.hidden_dropout, training=self.training)

    from transformers import Gemma3Config, Gemma3TextConfig

    inside = Gemma3TextConfig(hidden_size=8, num_hidden_layers=1)
    inside.hidden_dropout = 0.5
    model = Reading(Gemma3Config(text_config=inside.to_dict()))
    assert model.config.text_config.hidden_dropout == 0.5
    x = torch.ones(40)
    assert not torch.equal(model(x), x)
    turn_off_dropout(model)
    assert torch.equal(model(x), x) and model.dropout_every == 3 and model.drop_tokens is True
