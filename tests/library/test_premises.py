"""What a program may get wrong around rank changes: each is said in one line, and none changes ranks wrongly."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from flexlora_ds import (
    FlexLoRAConfig,
    RankController,
    TorchEngine,
    adapters,
    build_optimizer,
    inject_adapters,
    save_adapter,
)
from flexlora_ds.errors import RunError, UserError
from tests.helpers import tiny

CONFIG = FlexLoRAConfig(
    rank=4,
    dropout=0.0,
    target_modules="all-linear",
    adjust_start=1,
    adjust_freeze=2,
    adjust_interval=2,
    schedule="constant",
)
"""Changes after steps 3 and 5 of eight."""
STEPS = 8


def running(**options: Any) -> tuple[TorchEngine, RankController]:
    model = tiny.adapted_llama(CONFIG)
    engine = TorchEngine(model, build_optimizer(model, CONFIG, lr=1e-2), **options)
    return engine, RankController(engine, CONFIG, STEPS)


def update(engine: Any, step: int) -> None:
    rows = tiny.global_batch(step, 4, tiny.records(20))
    engine.backward(tiny.token_loss(engine, rows) / tiny.targets(rows))
    engine.step()


def train(engine: Any, controller: RankController, first: int, last: int) -> None:
    for step in range(first, last + 1):
        update(engine, step)
        controller.after_step(step)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0, r"^there is no step 0 \(after_step\); count updates from 1$"),
        (-1, r"^there is no step -1"),
        (1.5, r"^1\.5 is no number of a step"),
        ("3", r"^'3' is no number of a step"),
        (None, r"^None is no number of a step"),
    ],
)
def test_what_is_no_number_of_a_step_is_refused(given: Any, said: str) -> None:
    _, controller = running()
    with pytest.raises(UserError, match=said):
        controller.after_step(given)


def test_a_step_may_be_any_whole_number() -> None:
    engine, controller = running()
    train(engine, controller, 1, 2)
    update(engine, 3)
    assert controller.after_step(torch.tensor(3)) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("then", [2, 1, 4])
def test_steps_come_one_after_the_other(then: int) -> None:
    """Called twice; begun again with a second epoch; left out after an update."""
    engine, controller = running()
    train(engine, controller, 1, 2)
    update(engine, 3)
    before = controller.ranks
    with pytest.raises(
        UserError, match=rf"^step {then} follows step 2 \(after_step\); call it once after every"
    ):
        controller.after_step(then)
    assert controller.ranks == before


def test_a_controller_goes_on_from_its_state() -> None:
    engine, controller = running()
    train(engine, controller, 1, 4)
    other = RankController(engine, CONFIG, STEPS)
    other.load_state_dict(controller.state_dict())
    with pytest.raises(UserError, match=r"^step 1 follows step 4"):
        other.after_step(1)
    train(engine, other, 5, STEPS)
    assert other.changes == 2


def test_a_run_longer_than_it_was_said_to_be_is_told_once() -> None:
    engine, controller = running()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(engine, controller, 1, STEPS)
    with pytest.warns(UserWarning, match=r"^step 9 of a run of 8: .*total_steps") as told:
        train(engine, controller, STEPS + 1, STEPS + 3)
    assert len(told) == 1


def test_a_call_for_every_micro_step_is_refused_at_the_first() -> None:
    engine, controller = running(accumulation_steps=2)
    update(engine, 1)
    with pytest.raises(RunError, match=r"boundary only; call after_step once an update"):
        controller.after_step(1)


def test_a_call_before_the_update_is_refused() -> None:
    """A change of ranks would drop the gradients of an update that is still to come."""
    engine, controller = running()
    train(engine, controller, 1, 2)
    before = engine.global_steps
    with pytest.raises(
        UserError, match=r"^there was no update since the last call; the engine counts 2 \(after_step\)"
    ):
        controller.after_step(3)
    assert engine.global_steps == before
    update(engine, 3)
    assert controller.after_step(3) is not None, "the call that was refused has not been counted"


def test_what_is_no_engine_is_refused() -> None:
    model = tiny.adapted_llama(CONFIG)
    with pytest.raises(
        UserError,
        match=r"^a LlamaForCausalLM is no engine .*deepspeed\.initialize returned, or TorchEngine",
    ):
        RankController(model, CONFIG, STEPS)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = tiny.adapted_llama(CONFIG), tiny.adapted_llama(CONFIG)
    engine = TorchEngine(model, build_optimizer(other, CONFIG, lr=1e-2))
    said = r"^P of model\.layers\.0\.self_attn\.q_proj is in no group .*; give the engine build_optimizer"
    with pytest.raises(UserError, match=said):
        RankController(engine, CONFIG, STEPS)


def test_an_optimizer_without_a_part_of_the_adapters_is_refused() -> None:
    model = tiny.adapted_llama(CONFIG)
    last = adapters(model)["model.layers.1.mlp.down_proj"]
    last.lam.requires_grad_(False)
    own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(UserError, match=r"^λ of model\.layers\.1\.mlp\.down_proj is in no group"):
        RankController(TorchEngine(model, own), CONFIG, STEPS)


def test_a_model_that_is_not_in_memory_is_refused() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"q": nn.Linear(8, 8)})
    inject_adapters(model, CONFIG)
    engine = TorchEngine(model, build_optimizer(model, CONFIG, lr=1e-2))
    with pytest.raises(UserError, match=r"^P of q is not in memory \(device meta\); load the model whole$"):
        RankController(engine, CONFIG, STEPS)


def test_a_second_controller_that_changes_the_same_ranks_is_named() -> None:
    engine, controller = running()
    other = RankController(engine, CONFIG, STEPS)
    train(engine, controller, 1, 3)
    with pytest.raises(UserError, match=r"has rank \d, and this controller left it at 4; let one controller"):
        other.after_step(3)


def test_parameters_that_were_replaced_are_named() -> None:
    engine, controller = running()
    train(engine, controller, 1, 2)
    update(engine, 3)
    engine.module.load_state_dict(copy.deepcopy(engine.module.state_dict()), assign=True)
    with pytest.raises(
        UserError, match=r"q_proj are other objects than those in the optimizer; .*without assign$"
    ):
        controller.after_step(3)


@pytest.mark.parametrize(
    ("make", "warned"),
    [
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20), True),
        (
            lambda o: torch.optim.lr_scheduler.OneCycleLR(
                o, [g["lr"] for g in o.param_groups], total_steps=20
            ),
            False,
        ),
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: max(0, step - 3) / 5), False),
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=1e-4), False),
    ],
    ids=["OneCycleLR", "OneCycleLR by group", "a warm-up from 0", "CosineAnnealingLR"],
)
def test_a_schedule_that_takes_lambdas_own_rate_is_told_once(make: Any, warned: bool) -> None:
    model = tiny.adapted_llama(CONFIG)
    optimizer = build_optimizer(model, CONFIG, lr=1e-2)
    engine = TorchEngine(model, optimizer, lr_scheduler=make(optimizer))
    controller = RankController(engine, CONFIG, STEPS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(engine, controller, 1, STEPS)
    texts = [str(one.message) for one in told if "lambda_lr" in str(one.message)]
    said = "λ learns at 1 times the rate of P and Q, and lambda_lr means 4 times"
    assert len(texts) == warned and all(text.startswith(said) for text in texts)


def test_an_adapter_is_saved_from_an_engine(tmp_path: Any) -> None:
    model = tiny.adapted_llama(CONFIG)
    with pytest.raises(UserError, match=r"^a LlamaForCausalLM is no engine \(save_adapter\)"):
        save_adapter(model, tmp_path / "adapter", CONFIG, base_model="")
