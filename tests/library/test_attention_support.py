"""Which attention a model has, by its class and the classes of its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flexlora_ds.base_model.attention_support import supported_attention


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {"eager", "sdpa", "flash_attention_2"}),
        ("gemma2", {"eager", "flash_attention_2"}),
        ("bloom", {"eager"}),
        ("doge", {"eager", "sdpa"}),
    ],
)
def test_what_the_classes_say(kind: str, expected: set[str]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if kind == "gemma2" and type(model)._supports_sdpa:
        pytest.skip("Transformers 5.20 lets it use PyTorch's own")
    assert supported_attention(model) == expected


class Part(nn.Module):
    _supports_sdpa = True
    _supports_flash_attn = True
    _compatible_flash_implementations: Any = None


class Plain(Part):
    _supports_sdpa = False


class Fetched(Part):
    _compatible_flash_implementations = ("somebody/kernel",)


def test_every_part_counts_and_nothing_is_fetched_in_the_place_of_flash_attention() -> None:
    whole = Part()
    assert supported_attention(whole) == {"eager", "sdpa", "flash_attention_2"}
    whole.part = Fetched()
    assert supported_attention(whole) == {"eager", "sdpa"}
    whole.other = Plain()
    assert supported_attention(whole) == {"eager"}
