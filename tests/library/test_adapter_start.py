"""A PEFT adapter becomes P, λ and Q: the same update and the same logits, at any ranks and scales."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters, start_from_adapter
from flexlora_ds.adapter_start import factors_of
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.exports.truncation import Size, truncate
from flexlora_ds.peft_format import AdapterFactors, LoraMatrix, write_peft_adapter
from flexlora_ds.peft_reading.plain import read_peft_adapter
from launch.engine.adapter_start import doubts_of
from launch.options.train_options import TrainOptions
from tests.helpers.model_logits import apart, logits
from tests.helpers.zoo import make_model

TARGETS = ("q_proj", "v_proj", "down_proj")
CONFIG = FlexLoRAConfig(rank=8, alpha=24, dropout=0.0, target_modules=TARGETS)
MIXED = {
    "r": 4,
    "lora_alpha": 10,
    "rank_pattern": {"layers.0.self_attn.q_proj": 7, "down_proj": 2},
    "alpha_pattern": {"v_proj": 3},
}


def base(kind: str = "llama") -> Any:
    return make_model(kind).eval()


def trained_by_peft(folder: Path, kind: str = "llama", config: Any = None, **options: Any) -> Any:
    """A PEFT adapter all of whose numbers moved from where they began, written to a folder; its model."""
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else list(TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        chosen = config or LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **{**MIXED, **options})
        model = get_peft_model(base(kind), chosen)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(folder)
    return model.eval()


def update_of(P: Tensor, lam: Tensor, Q: Tensor, scaling: float) -> Tensor:
    return scaling * P.double() * lam.double() @ Q.double()


def peft_updates(model: Any) -> dict[str, Tensor]:
    """scale · B A of every layer, float64, from PEFT's own parameters and scale."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            A, B = (getattr(module, key)["default"].weight.detach().double() for key in ("lora_A", "lora_B"))
            found[name] = module.scaling["default"] * B @ A
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_update_and_the_logits_are_those_of_peft(tmp_path: Path, kind: str, use_rslora: bool) -> None:
    reference = trained_by_peft(tmp_path / "peft", kind, use_rslora=use_rslora)
    model, targets = base(kind), ("c_attn", "c_proj") if kind == "gpt2" else TARGETS
    config = FlexLoRAConfig(rank=8, alpha=24, dropout=0.0, target_modules=targets)
    inject_adapters(model, config)
    start = start_from_adapter(model, config, tmp_path / "peft")
    expected = peft_updates(reference)
    layers = adapters(model)
    assert set(start.ranks) == set(expected) == set(layers)
    if kind == "llama":
        assert set(start.ranks.values()) == {2, 4, 7}
    factors = {}
    for name, layer in layers.items():
        P, lam, Q = (p.detach() for p in (layer.P, layer.lam, layer.Q))
        found = update_of(P, lam, Q, config.scaling)
        assert (found - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max()
        assert (P.T @ P - torch.eye(len(lam))).abs().max() < 1e-5, "P is orthonormal"
        assert (Q @ Q.T - torch.eye(len(lam))).abs().max() < 1e-5, "Q is orthonormal"
        factors[name] = AdapterFactors(P, lam, Q)
    assert apart(logits(model), logits(reference)) < 1e-5
    write_peft_adapter(tmp_path / "ours", factors, config, "base")
    for name, matrix in read_peft_adapter(tmp_path / "ours").matrices.items():
        again = matrix.scale * matrix.B.double() @ matrix.A.double()
        assert (again - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max()


def test_keys_without_effect_are_warned_of(tmp_path: Path) -> None:
    """Whoever has written one meant a scale; the adapter is what PEFT made of it."""
    reference = trained_by_peft(tmp_path, alpha_pattern={"v_porj": 40})
    model = base()
    inject_adapters(model, CONFIG)
    with pytest.warns(UserWarning, match="alpha_pattern 'v_porj' matches none of 6 adapted layers"):
        start = start_from_adapter(model, CONFIG, tmp_path)
    assert apart(logits(model), logits(reference)) < 1e-5
    assert [doubt for doubt in doubts_of(start, TrainOptions(model="m")) if "v_porj" in doubt]


def test_a_budget_keeps_the_largest_singular_values_of_all(tmp_path: Path) -> None:
    trained_by_peft(tmp_path)
    model = base()
    inject_adapters(model, CONFIG)
    start = start_from_adapter(model, CONFIG, tmp_path, total_rank=15)
    expected = truncate(read_peft_adapter(tmp_path), Size(total_rank=15)).adapter
    assert sum(start.ranks.values()) == 15
    assert start.ranks == {name: matrix.rank for name, matrix in expected.matrices.items()}
    for name, layer in adapters(model).items():
        found = update_of(layer.P.detach(), layer.lam.detach(), layer.Q.detach(), CONFIG.scaling)
        assert (found - expected.matrices[name].delta()).abs().max() < 1e-5
    assert "kept 15 of" in start.remarks[0]


def test_matrices_that_the_adapter_lacks_begin_anew(tmp_path: Path) -> None:
    reference = trained_by_peft(tmp_path)
    model, plain = base(), base()
    config = FlexLoRAConfig(rank=3, dropout=0.0, target_modules=(*TARGETS, "up_proj"))
    for one in (model, plain):
        inject_adapters(one, config)
    start_from_adapter(model, config, tmp_path)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(adapters(model)[name].P, adapters(plain)[name].P)
    assert not adapters(model)[name].lam.any()
    assert apart(logits(model), logits(reference)) < 1e-5


@pytest.mark.parametrize("rank", [3, 40])
def test_directions_that_say_nothing_are_orthonormal_with_lambda_zero(rank: int) -> None:
    """An adapter that has just begun (B = 0), one padded with zeros, and one whose rank is above its shape's."""
    rng = torch.Generator().manual_seed(1)
    B, A = torch.randn(20, rank, generator=rng), torch.randn(rank, 30, generator=rng)
    B[:, 1:] = 0
    for matrix in (LoraMatrix(0 * B, A, 2.0), LoraMatrix(B, A, 2.0)):
        P, lam, Q = factors_of(matrix, 0.5)
        assert len(lam) == min(rank, 20)
        assert (P.T @ P - torch.eye(len(lam))).abs().max() < 1e-5
        assert (Q @ Q.T - torch.eye(len(lam))).abs().max() < 1e-5
        expected = matrix.delta().double()
        assert (update_of(P, lam, Q, 0.5) - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert int((lam > 1e-6).sum()) == int(bool(expected.any()))


KINDS: dict[str, Callable[[Path], Any]] = {
    "use_dora True is not plain LoRA": lambda folder: trained_by_peft(folder, use_dora=True),
    "modules_to_save .* is not plain LoRA": lambda folder: trained_by_peft(
        folder, modules_to_save=["lm_head"]
    ),
    "bias 'all' is not plain LoRA": lambda folder: trained_by_peft(folder, bias="all"),
    "peft_type 'ADALORA' is not plain LoRA": lambda folder: trained_by_peft(
        folder,
        config=AdaLoraConfig(target_modules=list(TARGETS), total_step=10, task_type="CAUSAL_LM"),
    ),
}


@pytest.mark.parametrize("said", KINDS)
def test_more_than_plain_lora_is_refused_by_name(tmp_path: Path, said: str) -> None:
    KINDS[said](tmp_path)
    model = base()
    inject_adapters(model, CONFIG)
    with pytest.raises(UserError, match=said):
        start_from_adapter(model, CONFIG, tmp_path)


def test_an_adapter_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    trained_by_peft(tmp_path / "peft")
    model = base()
    inject_adapters(model, replace(CONFIG, target_modules=("q_proj", "v_proj")))
    with pytest.raises(UserError, match=r"adapts model\.layers\.0\.mlp\.down_proj, .*name it in target_mod"):
        start_from_adapter(model, CONFIG, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("down_proj.lora_B.weight"))
    save_file({**tensors, key: torch.cat([tensors[key]] * 2)}, path)
    model = base()
    inject_adapters(model, CONFIG)
    with pytest.raises(UserError, match=r"down_proj is \(.*\) in the adapter and \(.*\) in the base model"):
        start_from_adapter(model, CONFIG, tmp_path / "peft")


def test_an_adapter_with_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    trained_by_peft(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    model = base()
    inject_adapters(model, CONFIG)
    with pytest.raises(RunError, match="holds numbers that are not finite"):
        start_from_adapter(model, CONFIG, tmp_path)
