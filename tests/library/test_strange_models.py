"""Unusual models and uses of them, in a loop of one's own: what learns, what is saved and what is refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from flexlora_ds import (
    RankController,
    TorchEngine,
    adapters,
    build_optimizer,
    inject_adapters,
    save_adapter,
)
from flexlora_ds.errors import UserError
from flexlora_ds.orthogonality import penalty_gradients
from tests.helpers.own_loop import config, trained


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
