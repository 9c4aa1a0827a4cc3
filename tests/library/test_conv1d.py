"""Layers that store their weight as [in, out] (GPT-2's Conv1D), adapted, exported and merged: PEFT's own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters
from flexlora_ds.adapter.layer import any_transposed
from flexlora_ds.errors import UserError
from flexlora_ds.export import (
    AdapterFactors,
    export_merged,
    export_uniform,
    read_peft_adapter,
    write_peft_adapter,
)
from flexlora_ds.peft_format import write_adapter
from tests.helpers.model_logits import IDS, apart, logits
from tests.helpers.zoo import make_model, write_model

CONFIG = FlexLoRAConfig(rank=3, alpha=7.0, dropout=0.0, target_modules=("all-linear",))


def with_one_linear(model: Any) -> Any:
    """The same function, with one of the layers as torch's own."""
    old = model.transformer.h[1].mlp.c_fc
    new = nn.Linear(old.nx, old.nf)
    new.weight.data, new.bias.data = old.weight.data.t().contiguous(), old.bias.data
    model.transformer.h[1].mlp.c_fc = new
    return model


def train_in_pretence(model: Any) -> dict[str, AdapterFactors]:
    inject_adapters(model, CONFIG)
    rng = torch.Generator().manual_seed(1)
    for i, layer in enumerate(adapters(model).values()):
        rank = 1 + i % 5
        layer.P.data = torch.randn(layer.out_features, rank, generator=rng) / 6
        layer.lam.data = torch.randn(rank, generator=rng)
        layer.Q.data = torch.randn(rank, layer.in_features, generator=rng) / 6
    return {n: AdapterFactors(m.P.data, m.lam.data, m.Q.data) for n, m in adapters(model).items()}


@pytest.mark.parametrize("change", [None, with_one_linear], ids=["Conv1D alone", "and a Linear"])
def test_peft_gives_the_training_models_logits(tmp_path: Path, change: Any) -> None:
    base = make_model("gpt2")
    untouched = logits(base)
    trained = make_model("gpt2")
    if change:
        base, trained = change(base), change(trained)
        assert apart(logits(base), untouched) < 1e-6
    matrices = train_in_pretence(trained)
    assert set(matrices) == {
        f"transformer.h.{i}.{name}"
        for i in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    expected = logits(trained)
    assert apart(untouched, expected) > 0.1
    assert any_transposed(adapters(trained))
    write_peft_adapter(tmp_path, matrices, CONFIG, "gpt2", fan_in_fan_out=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert apart(logits(PeftModel.from_pretrained(base, tmp_path)), expected) < 1e-5


def test_gradients_are_those_of_the_dense_weight() -> None:
    """Of P, λ and Q, through the layer as it trains, in fp64."""
    model = make_model("gpt2").double()
    train_in_pretence(model)
    for p in model.parameters():
        p.data = p.data.double()
    dense = make_model("gpt2").double()
    parts = {}
    for name, layer in adapters(model).items():
        parts[name] = [p.data.clone().requires_grad_() for p in (layer.P, layer.lam, layer.Q)]
        P, lam, Q = parts[name]
        plain = dense.get_submodule(name)
        whole = plain.weight.detach() + (layer.scaling * P @ torch.diag(lam) @ Q).t()
        del plain.weight
        plain.weight = whole
    push = torch.randn(3, 20, 420, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model(input_ids=IDS).logits.backward(push)
    dense(input_ids=IDS).logits.backward(push)
    for name, layer in adapters(model).items():
        for found, expected in zip((layer.P, layer.lam, layer.Q), parts[name], strict=True):
            assert found.grad is not None and expected.grad is not None
            assert torch.allclose(found.grad, expected.grad, rtol=1e-8, atol=1e-10), name


def test_exports_keep_the_logits(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "gpt2")
    trained = AutoModelForCausalLM.from_pretrained(base)
    matrices = train_in_pretence(trained)
    write_peft_adapter(tmp_path / "adapter", matrices, CONFIG, str(base), fan_in_fan_out=True)
    adapter = read_peft_adapter(tmp_path / "adapter")
    expected = logits(trained)
    export_uniform(adapter, tmp_path / "uniform")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert apart(logits(PeftModel.from_pretrained(plain, tmp_path / "uniform")), expected) < 1e-5
    export_merged(adapter, tmp_path / "merged")
    assert apart(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected) < 1e-5


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("targets", [r".*attn\.c_proj", ["c_attn", "lm_head"]])
def test_the_layers_type_decides_and_not_the_flag(tmp_path: Path, targets: Any, flag: bool) -> None:
    """Square matrices, and a tied head of the other orientation; both flags stand for the same adapter."""
    base = write_model(tmp_path / "base", "gpt2")
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": flag}))
    adapter = read_peft_adapter(tmp_path / "adapter")
    export_merged(adapter, tmp_path / "merged", base=str(base))
    assert apart(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model)) < 1e-5
    write_adapter(tmp_path / "again", adapter)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert apart(logits(PeftModel.from_pretrained(plain, tmp_path / "again")), logits(model)) < 1e-5


def test_a_model_without_a_layer_to_adapt_says_so() -> None:
    model = nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8), nn.Conv1d(8, 8, 1))
    for targets in (("all-linear",), ("q_proj",)):
        with pytest.raises(UserError, match="no linear layer but its head"):
            inject_adapters(model, FlexLoRAConfig(rank=2, target_modules=targets))
    with pytest.raises(UserError, match="this model has c_attn, c_fc, c_proj"):
        inject_adapters(make_model("gpt2"), FlexLoRAConfig(rank=2, target_modules=("q_proj",)))
