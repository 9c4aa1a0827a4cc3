"""The adapted layer against the formula y = W x + b + s · P diag(λ) Q x, and its injection into models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters
from flexlora_ds.adapter.layer import AdaptedLinear, forward_context
from flexlora_ds.dropout.mask import keep_mask, name_key
from flexlora_ds.errors import UserError
from tests.helpers.tiny import tiny_llama

IDS = torch.arange(1, 41).view(4, 10)
LINEAR = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        *(f"self_attn.{kind}_proj" for kind in "qkvo"),
        *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
    )
]


def config(*targets: str, **options: Any) -> FlexLoRAConfig:
    return FlexLoRAConfig(**{"rank": 4, "dropout": 0.0, "target_modules": targets or ("q_proj",), **options})


class Plain(nn.Module):
    """No transformers model: no `get_output_embeddings`, a bias, a last layer like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 9)
        self.norm = nn.LayerNorm(9)
        self.last = nn.Linear(9, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x)))
        return y


def adapted_plain(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Plain, AdaptedLinear]:
    """A plain model whose `first` is adapted, with λ drawn at random."""
    torch.manual_seed(0)
    model = Plain().to(dtype)
    inject_adapters(model, config("first", **options))
    layer = adapters(model)["first"]
    layer.lam.data.normal_()
    return model, layer


def dense(layer: AdaptedLinear, x: Tensor) -> Tensor:
    """The formula, with the whole product formed; x [..., in]."""
    update = layer.P @ torch.diag(layer.lam) @ layer.Q
    weight = layer.base.weight + (layer.scaling * update).to(layer.base.weight)
    return torch.einsum("...i,oi->...o", x, weight) + layer.base.bias


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), [n for n in LINEAR if n.endswith("q_proj")]),
        (("down_proj", "k_proj"), [n for n in LINEAR if n.endswith(("down_proj", "k_proj"))]),
        (("self_attn.v_proj",), [n for n in LINEAR if n.endswith("v_proj")]),
        (("model.layers.1.mlp.up_proj",), ["model.layers.1.mlp.up_proj"]),
        ((r".*\.1\..*[kv]_proj",), ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"]),
        (("q_proj", r".*\.0\.mlp\.gate_proj"), [LINEAR[0], LINEAR[4], LINEAR[7]]),
        (("all-linear",), LINEAR),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_targets_are_suffixes_regular_expressions_or_all(
    targets: tuple[str, ...], expected: list[str]
) -> None:
    model = tiny_llama()
    assert inject_adapters(model, config(*targets)) == expected
    assert list(adapters(model)) == expected
    for name in expected:
        layer = model.get_submodule(name)
        assert isinstance(layer, AdaptedLinear) and layer.name == name
    assert type(model.lm_head) is nn.Linear, "the output head is never adapted"


def test_a_suffix_is_whole_words_and_a_pattern_the_whole_name() -> None:
    for target in ("proj", "_proj", r"layers\.0\.self_attn\.q_proj"):
        with pytest.raises(UserError, match="matches no linear layer"):
            inject_adapters(tiny_llama(), config(target))


def test_a_target_without_a_match_lists_what_there_is() -> None:
    model = tiny_llama()
    with pytest.raises(UserError) as caught:
        inject_adapters(model, config("q_proj", "query_proj"))
    message = str(caught.value)
    assert "'query_proj'" in message and "lm_head" not in message
    assert all(f"{kind}_proj" in message for kind in ("q", "k", "v", "o", "gate", "up", "down"))
    assert not adapters(model) and all(p.requires_grad for p in model.parameters()), "nothing half-done"


def test_an_invalid_pattern_is_named() -> None:
    with pytest.raises(UserError, match=r"'\*\.q_proj' is neither a name nor a regular expression"):
        inject_adapters(tiny_llama(), config("*.q_proj"))


def test_a_rank_above_a_layers_limit_names_layer_and_limit() -> None:
    model = tiny_llama()  # k_proj is 16 × 32
    with pytest.raises(UserError, match=r"rank 17 .* 16 .*model\.layers\.0\.self_attn\.k_proj"):
        inject_adapters(model, config("all-linear", rank=17))
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())
    inject_adapters(model, config("k_proj", rank=16))


def test_adapters_are_not_put_on_adapters() -> None:
    model = tiny_llama()
    inject_adapters(model, config("q_proj"))
    with pytest.raises(UserError, match="already"):
        inject_adapters(model, config("k_proj"))


def test_adapters_are_not_put_beside_pefts() -> None:
    """PEFT's would be frozen, and the names in the saved adapter would be those of PEFT's wrappers."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model

    lora = LoraConfig(r=2, target_modules=["q_proj"])
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    inside, emptied = tiny_llama(), tiny_llama()
    inject_adapter_in_model(lora, inside)
    emptied.peft_config = {}  # as transformers leaves it after delete_adapter
    wrapped = [get_peft_model(tiny_llama(), lora), get_peft_model(tiny_llama(), prompt)]
    for model in (*wrapped, inside, emptied):
        with pytest.raises(
            UserError, match=r"^the model carries an adapter of PEFT's already; merge_and_unload"
        ):
            inject_adapters(model, config("v_proj"))
    merged = get_peft_model(tiny_llama(), lora).merge_and_unload()
    assert inject_adapters(merged, config("q_proj")) == [n for n in LINEAR if n.endswith("q_proj")]


def test_a_state_of_other_ranks_is_told_with_what_to_do() -> None:
    from flexlora_ds.checkpoint.state import set_ranks

    trained, fresh = tiny_llama(seed=1), tiny_llama()
    for model in (trained, fresh):
        inject_adapters(model, config("q_proj"))
    ranks = {name: 3 + 2 * i for i, name in enumerate(adapters(trained))}
    set_ranks(trained, ranks)
    for layer in adapters(trained).values():
        for p in (layer.P, layer.lam, layer.Q):
            p.data.normal_()
    said = r"layers\.0\.self_attn\.q_proj has rank 3 there and 4 here: .*set_ranks\(model, \{name: rank\}\)"
    with pytest.raises(RuntimeError, match=said):
        fresh.load_state_dict(trained.state_dict())
    set_ranks(fresh, ranks)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(input_ids=IDS).logits, trained(input_ids=IDS).logits)


def test_a_context_needs_adapters() -> None:
    with pytest.raises(UserError, match="inject_adapters"):
        forward_context(tiny_llama())


@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 3, 12)], ids=str)
def test_forward_is_the_dense_formula(shape: tuple[int, ...]) -> None:
    _, layer = adapted_plain(alpha=6.0)
    x = drawn(*shape)
    assert layer.scaling == 6.0 / 4
    torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-12, atol=1e-12)
    assert (layer(x) - layer.base(x)).abs().max() > 0.01


def test_gradients_are_those_of_the_dense_formula() -> None:
    _, layer = adapted_plain()
    x, weight = drawn(7, 12), drawn(7, 9)
    params = [layer.P, layer.lam, layer.Q]
    found = torch.autograd.grad((layer(x) * weight).sum(), params)
    expected = torch.autograd.grad((dense(layer, x) * weight).sum(), params)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_start_is_the_bases_function_bit_for_bit(dtype: str) -> None:
    model = tiny_llama(dtype)
    with torch.no_grad():
        expected = model(IDS).logits
        inject_adapters(model, config("all-linear", dropout=0.5))
        assert all(layer.P.abs().min() > 0 for layer in adapters(model).values())
        for training in (False, True):
            assert torch.equal(model.train(training)(IDS).logits, expected)


def test_the_start_is_drawn_by_name_and_seed_alone() -> None:
    both, one, other = tiny_llama(), tiny_llama(seed=9), tiny_llama()
    inject_adapters(both, config("all-linear"))
    inject_adapters(one, config("v_proj"))
    inject_adapters(other, config("v_proj", seed=1))
    for name, layer in adapters(one).items():
        assert torch.equal(layer.P, adapters(both)[name].P) and torch.equal(layer.Q, adapters(both)[name].Q)
        assert not torch.equal(layer.P, adapters(other)[name].P)


@pytest.mark.parametrize(("init_std", "expected"), [("unit", 1.0), (0.02, 0.02 * 4096**0.5)])
def test_the_initial_norm_of_a_direction(init_std: Any, expected: float) -> None:
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False, device="meta")).to_empty(device="cpu")
    inject_adapters(model, config("0", init_std=init_std, rank=8))
    layer = adapters(model)["0"]
    assert layer.P.norm(dim=0).mean().item() == pytest.approx(expected, rel=0.03)
    assert layer.Q.norm(dim=1).mean().item() == pytest.approx(expected, rel=0.03)


def test_the_base_is_frozen_and_gets_no_gradient() -> None:
    model, _ = adapted_plain()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"first.P", "first.lam", "first.Q"}
    model(drawn(3, 12)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == trainable
    assert all(grad.abs().max() > 0 for grad in gradients.values())


def test_dropout_with_row_keys_is_a_masked_computation() -> None:
    p = 0.3
    model, layer = adapted_plain(dropout=p)
    model.train()
    x, keys = drawn(2, 5, 12), torch.arange(100, 110).view(2, 5)
    layer.context.row_keys = keys
    mask = keep_mask(keys.reshape(-1), name_key("first"), 12, p).view(2, 5, 12)
    assert 0 < mask.double().mean() < 1
    update = layer.scaling * layer.P @ torch.diag(layer.lam) @ layer.Q
    expected = layer.base(x) + torch.einsum("bti,oi->bto", x * mask / (1 - p), update)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.eval().first(x), dense(layer, x), rtol=1e-12, atol=1e-12)


def test_dropout_without_row_keys_is_torchs_and_unbiased() -> None:
    model, layer = adapted_plain(dropout=0.5)
    model.train()
    x = drawn(1, 12).expand(20_000, 12)
    torch.manual_seed(3)
    passed = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), passed), "torch's generator decides"
    error = (passed.mean(0) - dense(layer, x[:1])[0]).abs() / (passed.std(0) / 20_000**0.5)
    assert error.max() < 5


def test_row_keys_of_another_batch_are_refused() -> None:
    model, layer = adapted_plain(dropout=0.1)
    layer.context.row_keys = torch.arange(4)
    with pytest.raises(ValueError, match=r"first: 5 input rows, but 4 row keys"):
        model.train()(drawn(5, 12))


def test_the_adapter_takes_the_dtype_of_its_base() -> None:
    model, layer = adapted_plain(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    x = drawn(7, 12, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    exact = dense(layer.double(), x.double())
    layer.bfloat16()
    assert ((layer(x) - exact).abs().max() / exact.abs().max()) < 0.02


def test_an_adapter_of_another_dtype_than_its_base_works() -> None:
    """Masters in the model beside a half-precision base, as PEFT keeps them."""
    _, layer = adapted_plain(torch.bfloat16)
    for p in (layer.P, layer.lam, layer.Q):
        p.data = p.data.float()
    x = drawn(7, 12, dtype=torch.bfloat16)
    layer.context.plain = True
    update = (x.float() @ layer.Q.T * (layer.lam * layer.scaling)) @ layer.P.T
    assert torch.equal(layer(x), layer.base(x) + update.to(torch.bfloat16)), "the adapter in its own dtype"
    layer.context.plain = False
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), layer.base(x).float() + update, rtol=0.02, atol=0.05)


def test_a_plain_module_has_no_head_to_leave_out() -> None:
    model = Plain()
    assert inject_adapters(model, config("all-linear")) == ["first", "last"]
    assert model(torch.randn(2, 12)).shape == (2, 5)


def test_training_mode_follows_the_model() -> None:
    for training in (True, False):
        model = tiny_llama().train(training)
        inject_adapters(model, config("all-linear"))
        assert all(layer.training is training for layer in adapters(model).values())
