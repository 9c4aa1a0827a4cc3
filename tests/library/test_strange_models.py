"""Models of other shapes than a decoder of text, in a loop of one's own: what is adapted, learns and is saved."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from flexlora_ds import (
    FlexLoRAConfig,
    RankController,
    TorchEngine,
    adapters,
    build_optimizer,
    inject_adapters,
    save_adapter,
    start_from_gradient,
)
from flexlora_ds.adapter.peft_names import MAMBA, READ_BY_KERNELS, STACKED
from flexlora_ds.errors import UserError
from flexlora_ds.orthogonality import penalty_gradients
from flexlora_ds.rank_changes.record import RankChange

IDS = torch.randint(2, 60, (4, 9), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WORDS = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WIDE = {"initializer_range": 0.3}


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 1,
    }
    return T5ForConditionalGeneration(T5Config(**shape, **WORDS))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sides = ("layers", 2), ("attention_heads", 2), ("ffn_dim", 32)
    shape = {f"{side}_{name}": count for side in ("encoder", "decoder") for name, count in sides}
    return BartForConditionalGeneration(
        BartConfig(
            d_model=16, max_position_embeddings=32, decoder_start_token_id=1, init_std=0.3, **shape, **WORDS
        )
    )


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sight = {**NARROW, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config={**NARROW, **WORDS}, vision_config=sight, projection_dim=8))


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    shape = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    return SwinForImageClassification(SwinConfig(**shape, **WIDE, window_size=2, num_labels=3))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**NARROW, **WIDE, image_size=16, patch_size=8, num_labels=3))


INPUTS: dict[Callable[[], nn.Module], dict[str, Any]] = {
    t5: {"input_ids": IDS, "labels": IDS[:, :5].contiguous()},
    bart: {"input_ids": IDS, "labels": IDS[:, :5].contiguous()},
    clip: {"input_ids": IDS, "pixel_values": IMAGES, "return_loss": True},
    swin: {"pixel_values": IMAGES, "labels": torch.tensor([0, 1, 2, 0])},
    vit: {"pixel_values": IMAGES, "labels": torch.tensor([0, 1, 2, 0])},
}


def config(**options: Any) -> FlexLoRAConfig:
    calendar = {"adjust_start": 1, "adjust_freeze": 0, "adjust_interval": 1, "schedule": "constant"}
    given = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear", **calendar, **options}
    return FlexLoRAConfig(**given)


def trained(
    model: nn.Module, settings: FlexLoRAConfig, loss: Callable[[Any], Tensor], steps: int = 4
) -> tuple[TorchEngine, RankController, list[RankChange]]:
    """A few steps with rank changes on an adapted model."""
    engine = TorchEngine(model, build_optimizer(model, settings, lr=1e-2))
    controller = RankController(engine, settings, steps + 1)
    changes = []
    for step in range(1, steps + 1):
        engine.backward(loss(engine))
        engine.step()
        changes.append(controller.after_step(step))
    return engine, controller, [change for change in changes if change is not None]


@pytest.mark.parametrize("make", INPUTS, ids=lambda make: str(make.__name__))
def test_all_linear_layers_but_the_head_are_adapted_begin_with_the_gradient_and_learn(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """Both the encoder and the decoder; gradients beside autograd's own of the dense weights."""
    torch.manual_seed(0)
    model, inputs = make(), INPUTS[make]
    base = copy.deepcopy(model).eval()
    dense = copy.deepcopy(model).eval()
    dense(**inputs).loss.backward()
    gradients = {name: m.weight.grad for name, m in dense.named_modules() if isinstance(m, nn.Linear)}
    settings = config(init="gradient", importance="growth", new_direction="gradient")
    head = ("classifier",) if hasattr(model, "classifier") else ()
    names = inject_adapters(model, settings, modules_to_save=head)
    assert set(gradients) - set(names) <= {"lm_head", *head}
    model.eval()  # without dropout, as the dense model
    start = start_from_gradient(model, settings, lambda: [model(**inputs).loss])
    assert not start.gaussian
    for name, sigma in start.sigma.items():
        expected = torch.linalg.svdvals(gradients[name])[:2]
        assert sigma[0] == pytest.approx(float(expected[0]), rel=0.02), name
    heads = [{"params": model.get_submodule(name).parameters()} for name in head]
    engine = TorchEngine(model, build_optimizer(model, settings, lr=1e-2, extra_groups=heads))
    controller = RankController(engine, settings, 6)
    for step in range(1, 6):
        engine.backward(engine(**inputs).loss)
        engine.step()
        controller.after_step(step)
    assert all(bool(layer.lam.any()) for layer in adapters(model).values()), "every matrix has learnt"
    save_adapter(engine, tmp_path, settings, base_model="", task_type=None, modules_to_save=head)
    with torch.no_grad():
        expected = model(**inputs).loss
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert float(loaded(**inputs).loss) == pytest.approx(float(expected), rel=1e-5)


def deepseek() -> nn.Module:
    """Its first layer is dense, and its second has a shared expert beside the stacked ones."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    latent = {
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    first = {"first_k_dense_replace": 1, "moe_intermediate_size": 16}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**NARROW, **WORDS, **experts, **latent, **first, **WIDE))


def mamba() -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 8,
        "head_dim": 8,
        "num_heads": 4,
        "n_groups": 1,
    }
    return Mamba2ForCausalLM(Mamba2Config(**shape, **WORDS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [deepseek, mamba], ids=lambda make: str(make.__name__))
def test_layers_whose_adapter_peft_would_lose_are_left_out(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    base = copy.deepcopy(model).eval()
    names = inject_adapters(model, config())
    assert names and not {name.rpartition(".")[2] for name in names} & {
        "down_proj",
        "up_proj",
        "gate_proj",
        "out_proj",
    }
    for layer in adapters(model).values():
        layer.lam.data.fill_(1.0)
    engine = TorchEngine(model.eval(), build_optimizer(model, config(), lr=1e-2))
    save_adapter(engine, tmp_path, config(), base_model="")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert (base(input_ids=IDS).logits - expected).abs().max() > 0.01
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_names_that_peft_loses_are_those_of_its_own_tables() -> None:
    import inspect

    from peft.tuners import tuners_utils
    from peft.utils import transformers_weight_conversion as conversion

    theirs = {kind: frozenset(names) for kind, names in conversion._MOE_TARGET_MODULE_MAPPING.items()}
    assert theirs == STACKED
    source = inspect.getsource(tuners_utils._check_lora_target_modules_mamba)
    assert all(f'"{name}"' in source for name in (*MAMBA, *READ_BY_KERNELS))


class Encoder(nn.Module):
    """Torch's own transformer layers; a plain module, which names no embedding."""

    def __init__(self, activation: str = "relu") -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        y: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return y


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_layers_compute_their_adapters_in_evaluation_too(
    activation: str, padded: bool
) -> None:
    """Beside the same layers with the update in their weights."""
    torch.manual_seed(0)
    model = Encoder(activation)
    merged = copy.deepcopy(model)
    names = inject_adapters(model, config())
    assert names == [f"encoder.layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2)]
    for name, layer in adapters(model).items():
        layer.lam.data.fill_(0.7)
        update = layer.scaling * layer.P @ torch.diag(layer.lam) @ layer.Q
        merged.get_submodule(name).weight.data += update.detach()
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]]) if padded else None
    for training in (True, False):
        with torch.no_grad():
            found, expected = model.train(training)(x, padding), merged.train(training)(x, padding)
        kept = slice(None) if padding is None else ~padding
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_the_output_of_torchs_attention_cannot_be_adapted() -> None:
    with pytest.raises(
        UserError,
        match=r"'out_proj' matches no linear layer that can be adapted; this model has linear1, linear2",
    ):
        inject_adapters(Encoder(), config(target_modules="out_proj"))


def test_a_plain_module_begins_with_its_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    x = torch.randn(7, 6)
    dense = copy.deepcopy(model)
    dense(x).square().sum().backward()
    inject_adapters(model, config())
    start = start_from_gradient(model, config(), lambda: [model(x).square().sum()])
    for name, sigma in start.sigma.items():
        weight: Any = dense.get_submodule(name).weight
        assert sigma == pytest.approx(torch.linalg.svdvals(weight.grad)[:2].tolist(), rel=1e-4)


class Experts(nn.Module):
    """Of three experts the last is never asked before `late`."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.late = False

    def forward(self, x: Tensor) -> Tensor:
        asked = self.experts if self.late else self.experts[:2]
        return torch.stack([expert(x) for expert in asked]).sum(0)


@pytest.mark.parametrize("importance", ["entropy", "sensitivity"])
@pytest.mark.parametrize("frozen", [False, True])
def test_ranks_change_beside_matrices_that_no_gradient_has_reached(importance: str, frozen: bool) -> None:
    """An idle expert, or one that its user has frozen; asked later, it moves as a newborn does."""
    torch.manual_seed(0)
    model = Experts()
    settings = config(importance=importance, orth_weight=0.0)
    inject_adapters(model, settings)
    if frozen:
        for p in model.experts[2].parameters():
            p.requires_grad_(False)
    model.late = frozen
    x = torch.randn(5, 6)
    engine, controller, changes = trained(model, settings, lambda engine: engine(x).square().mean())
    assert controller.changes == 3 and controller.total_rank == 6
    said = [[text for text in change.warnings if "λ is still 0" in text] for change in changes]
    assert [len(of_change) for of_change in said] == [1, 0, 0]
    assert "in 1 of 3 matrices, experts.2 for one" in said[0][0]
    idle = adapters(model)["experts.2"]
    assert not idle.lam.any()
    for p in (idle.P, idle.lam, idle.Q):
        p.requires_grad_(True)
    model.late = True
    engine.backward(engine(x).square().mean())
    engine.step()
    rate = 1e-2 * 6**0.5  # Adam's first step is the rate, and λ's is √6 times the base one
    torch.testing.assert_close(idle.lam.abs(), torch.full_like(idle.lam, rate), rtol=1e-3, atol=0)


class Shared(nn.Module):
    """One layer, called three times in a pass, as ALBERT's are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_a_layer_that_is_called_several_times_gets_its_penalty_once_an_update(form: str) -> None:
    torch.manual_seed(0)
    settings = config(orth_form=form, orth_weight=0.3)
    model = Shared()
    inject_adapters(model, settings)
    layer = adapters(model)["layer"]
    layer.P.data *= 3
    engine = TorchEngine(model, build_optimizer(model, settings, lr=0.0))
    controller = RankController(engine, settings, 10)
    x = torch.randn(5, 6)
    for step in (1, 2):
        engine.backward(0 * engine(x).sum())  # λ is 0: no gradient but the penalty's
        expected = [0.3 / 2 * value for value in penalty_gradients(layer.P, layer.Q, form)]
        assert layer.P.grad is not None and layer.Q.grad is not None
        torch.testing.assert_close(layer.P.grad, expected[0])
        torch.testing.assert_close(layer.Q.grad, expected[1])
        engine.step()
        controller.after_step(step)


def test_parts_that_were_adapted_by_themselves_are_refused() -> None:
    model = nn.ModuleDict(
        {"query": nn.Sequential(nn.Linear(6, 6)), "passage": nn.Sequential(nn.Linear(6, 6))}
    )
    for part in model.values():
        inject_adapters(part, config())
    with pytest.raises(UserError, match=r"two adapted layers are named 0, .*; call inject_adapters once"):
        adapters(model)


def test_a_model_that_was_taken_apart_after_its_adaptation_is_refused() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6)) for _ in range(3)))
    inject_adapters(model, config())
    wrapped = nn.ModuleDict({"module": model})
    build_optimizer(wrapped, config(), lr=1e-3)  # what wraps it changes no name
    with pytest.raises(UserError, match=r"adapted as 1\.0 stands at 0\.0 now"):
        build_optimizer(nn.Sequential(*model[1:]), config(), lr=1e-3)


def with_head() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(6, 6), "head": nn.Linear(6, 3)})


def test_what_trains_beside_the_adapters_and_is_not_saved_is_named(tmp_path: Path) -> None:
    model: Any = with_head()
    inject_adapters(model, config(), modules_to_save=["head"])
    heads = [{"params": model.head.parameters()}]
    engine = TorchEngine(model, build_optimizer(model, config(), lr=1e-3, extra_groups=heads))
    with pytest.warns(
        UserWarning, match=r"^head\.weight and 1 more are trained and not saved: .*modules_to_save$"
    ):
        save_adapter(engine, tmp_path, config(), base_model="")


def test_a_head_in_no_group_is_named_and_saved_as_it_is(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model: Any = with_head()
    inject_adapters(model, config(), modules_to_save=["head"])
    engine = TorchEngine(model, build_optimizer(model, config(), lr=1e-3))
    with pytest.warns(
        UserWarning, match=r"^head\.weight and 1 more would get gradients and no update: .*extra_groups$"
    ):
        RankController(engine, config(), 10)
    save_adapter(engine, tmp_path, config(), base_model="", modules_to_save=["head"])
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.head.weight"], model.head.weight)


def test_a_copy_of_a_model_in_training_is_a_model_of_its_own() -> None:
    """What is written of it, too, holds nothing of the run: no engine and no optimizer."""
    torch.manual_seed(0)
    model = Shared()
    settings = config(orth_form="norm", new_direction="gradient")
    inject_adapters(model, settings)
    x = torch.randn(5, 6)
    trained(model, settings, lambda engine: engine(x).square().mean(), 2)
    other = copy.deepcopy(model)
    torch.save(model, file := io.BytesIO())
    assert file.tell() < 20_000
    assert torch.equal(other(x), model(x))
    layer = adapters(other)["layer"]
    assert layer.context.penalty is layer.context.observer is None
    assert adapters(model)["layer"].context.penalty is not None
    assert layer.weight is layer.base.weight


def test_an_optimizer_whose_states_are_no_parameters_shape_is_refused() -> None:
    model = Shared()
    inject_adapters(model, config())
    engine = TorchEngine(model, torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad]))
    controller = RankController(engine, config(), 5)
    adapters(model)["layer"].lam.data.fill_(0.3)
    engine.backward(engine(torch.randn(5, 6)).square().mean())
    engine.step()
    with pytest.raises(
        UserError, match=r"not of a parameter's shape, .* \(Adafactor\); use build_optimizer's"
    ):
        controller.after_step(1)


def test_a_model_in_double_precision_trains_as_in_single() -> None:
    losses = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = Shared().to(dtype)
        x = torch.randn(5, 6).to(dtype)
        inject_adapters(model, config())
        of_steps: list[float] = []

        def loss(engine: Any, x: Tensor = x, of_steps: list[float] = of_steps) -> Tensor:
            value: Tensor = engine(x).square().mean()
            of_steps.append(float(value.detach()))
            return value

        _, controller, changes = trained(model, config(direction="expand"), loss, 5)
        assert all(change.expanded for change in changes) and controller.changes == 4
        assert adapters(model)["layer"].P.dtype == dtype
        losses.append(of_steps)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


class Normalised(nn.Module):
    """Batch normalisation in the base and in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.body = nn.Linear(6, 6)
        self.classifier = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.body(self.norm(x)))
        return y


def test_statistics_of_the_base_stay_and_those_of_the_head_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Normalised()
    base = copy.deepcopy(model).eval()
    x = 3 * torch.randn(16, 6) + 1
    inject_adapters(model, config(), modules_to_save=["classifier"])
    heads = [{"params": model.classifier.parameters()}]
    engine = TorchEngine(model, build_optimizer(model, config(), lr=1e-2, extra_groups=heads))
    for _ in range(4):
        engine.backward(engine(x).square().mean())
        engine.step()
    assert torch.equal(model.norm.running_mean, base.norm.running_mean)
    assert float(model.classifier[0].running_mean.abs().max()) > 0.01
    save_adapter(engine, tmp_path, config(), base_model="", task_type=None, modules_to_save=["classifier"])
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.eval()(x))
