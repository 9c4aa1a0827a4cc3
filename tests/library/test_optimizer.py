"""FlexLoRAAdamW against torch's AdamW, scalar Adam per element, and AdaLoRA's averages."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flexlora_ds.optimizer import FlexLoRAAdamW


def parameters(
    *shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def feed(params: Iterable[Tensor], step: int) -> None:
    """The same drawn gradients for equal lists of parameters, of very different sizes over the steps."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 10.0 ** (step % 7 - 3)).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        feed(params, step)
        optimizer.step()


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups with everything different."""
    return [
        {"params": params[:2], "lr": 3e-3, "weight_decay": 0.1},
        {"params": params[2:], "lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.0},
    ]


def snapshot(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in optimizer.state[p].items()}


@pytest.mark.parametrize("per_element_age", [True, False])
def test_equal_ages_give_torchs_adamw(per_element_age: bool) -> None:
    shapes = [(17, 4), (4,), (4, 9), (1,), (0,)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    for params in (ours, theirs):
        params[2].data = params[2].data.T.contiguous().T  # memory in the order of the transpose
    optimizer = FlexLoRAAdamW(groups(ours), per_element_age=per_element_age)
    reference = torch.optim.AdamW(groups(theirs))
    scheduler, twin = (torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 300) for o in (optimizer, reference))
    for step in range(300):
        train(optimizer, ours, range(step, step + 1))
        train(reference, theirs, range(step, step + 1))
        scheduler.step()
        twin.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)
        for key, value in reference.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=1e-6, atol=0)
        assert ("age" in optimizer.state[p]) is per_element_age
        if per_element_age:
            assert torch.equal(optimizer.state[p]["age"], torch.full_like(p, 300))


def scalar_adam(
    w: float,
    grads: list[float],
    m: float,
    v: float,
    age: int,
    lr: float,
    betas: tuple[float, float],
    decay: float,
) -> float:
    """Kingma & Ba's algorithm 1 with decoupled decay, for one number in double precision."""
    for g in grads:
        age += 1
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        w -= lr * decay * w
        w -= lr * (m / (1 - betas[0] ** age)) / (math.sqrt(v / (1 - betas[1] ** age)) + 1e-8)
    return w


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 6), decay=st.sampled_from([0.0, 0.1]))
def test_every_element_is_corrected_by_its_own_age(seed: int, steps: int, decay: float) -> None:
    count, generator = 8, torch.Generator().manual_seed(seed)
    w, m, *grads = torch.randn(2 + steps, count, generator=generator).tolist()
    v = (torch.rand(count, generator=generator) + 1e-3).tolist()
    ages = [int(10**power) for power in (7 * torch.rand(count, generator=generator)).tolist()]
    ages[0] = 0
    p = nn.Parameter(torch.tensor(w))
    optimizer = FlexLoRAAdamW([p], lr=1e-2, weight_decay=decay)
    optimizer.state[p].update(
        step=torch.tensor(999.0),
        exp_avg=torch.tensor(m),
        exp_avg_sq=torch.tensor(v),
        age=torch.tensor(ages, dtype=torch.float32),
    )
    for row in grads:
        p.grad = torch.tensor(row)
        optimizer.step()
    expected = [
        scalar_adam(w[i], [row[i] for row in grads], m[i], v[i], ages[i], 1e-2, (0.9, 0.999), decay)
        for i in range(count)
    ]
    torch.testing.assert_close(p.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert optimizer.state[p]["age"].tolist() == [age + steps for age in ages]
    assert float(optimizer.state[p]["step"]) == 999.0 + steps


def with_a_new_row(per_element_age: bool) -> tuple[FlexLoRAAdamW, nn.Parameter]:
    """A parameter after 100,000 steps of gradient 1, its last row a new direction with zero state."""
    (p,) = parameters((4, 6))
    optimizer = FlexLoRAAdamW([p], lr=1e-3, per_element_age=per_element_age)
    state = optimizer.state[p]
    state["step"] = torch.tensor(1e5)
    for key, value in (("exp_avg", 1.0), ("exp_avg_sq", 1.0), ("age", 1e5)):
        if key in optimizer.state_keys():
            state[key] = torch.full((4, 6), value)
            state[key][-1] = 0.0
    with torch.no_grad():
        p[-1] = 0.0
    return optimizer, p


def row_moves(per_element_age: bool, steps: int) -> Tensor:
    """How far the new row moves in each step, in units of lr; [steps, width]."""
    optimizer, p = with_a_new_row(per_element_age)
    places = [p.detach()[-1].clone()]
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
        places.append(p.detach()[-1].clone())
    return (torch.stack(places[1:]) - torch.stack(places[:-1])).abs() / 1e-3


def test_a_new_direction_moves_like_a_fresh_adam_where_plain_adam_overshoots() -> None:
    own_age, plain = row_moves(True, 100), row_moves(False, 100)
    assert float(own_age.max()) <= 1.001
    assert float(own_age.sum(0).max()) == pytest.approx(100, rel=1e-3)
    # The known overshoot: 3.2 lr at once, 6.6 lr in the twelfth step, 466 lr in a hundred.
    assert float(plain[0].max()) == pytest.approx(3.16, abs=0.1)
    assert float(plain[11].max()) == pytest.approx(6.6, abs=0.1)
    assert float(plain.sum(0).max()) == pytest.approx(466, abs=10)


def test_a_new_direction_among_old_ones_is_a_fresh_adamw_bit_by_bit() -> None:
    optimizer, p = with_a_new_row(True)
    alone = nn.Parameter(p.detach()[-1].clone())
    fresh = FlexLoRAAdamW([alone], lr=1e-3)
    torchs = nn.Parameter(p.detach()[-1].clone())
    reference = torch.optim.AdamW([torchs], lr=1e-3, weight_decay=0.0)
    for step in range(50):
        feed([p], step)
        assert p.grad is not None
        alone.grad, torchs.grad = p.grad[-1].clone(), p.grad[-1].clone()
        for each in (optimizer, fresh, reference):
            each.step()
    assert torch.equal(p.detach()[-1], alone.detach())
    torch.testing.assert_close(alone, torchs, rtol=2e-6, atol=1e-7)


def test_partitions_of_a_flat_tensor_move_like_the_whole() -> None:
    whole = parameters((300_007,))
    cuts = [0, 40, 40, 131_072, 200_001, 300_007]
    parts = [nn.Parameter(whole[0].detach()[a:b].clone()) for a, b in pairwise(cuts)]
    optimizers = [FlexLoRAAdamW(params, weight_decay=0.1, sensitivity=True) for params in (whole, parts)]
    for step in range(5):
        feed(whole, step)
        assert whole[0].grad is not None
        for part, (a, b) in zip(parts, pairwise(cuts), strict=True):
            part.grad = whole[0].grad[a:b].clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat([part.detach() for part in parts]), whole[0].detach())
    for key in optimizers[0].state_keys():
        joined = torch.cat([optimizers[1].state[part][key] for part in parts])
        assert torch.equal(joined, optimizers[0].state[whole[0]][key]), key


def test_averages_are_adaloras() -> None:
    ours = parameters((5, 3), (3,))
    optimizer = FlexLoRAAdamW(ours, sensitivity=True, weight_decay=0.5)
    averages = [torch.zeros_like(p) for p in ours]
    deviations = [torch.zeros_like(p) for p in ours]
    for step in range(40):
        feed(ours, step)
        for i, p in enumerate(ours):
            assert p.grad is not None
            current = (p.detach() * p.grad).abs()
            averages[i] = 0.85 * averages[i] + 0.15 * current
            deviations[i] = 0.85 * deviations[i] + 0.15 * (current - averages[i]).abs()
        optimizer.step()
        for p, average, deviation in zip(ours, averages, deviations, strict=True):
            torch.testing.assert_close(optimizer.state[p]["sensitivity"], average, rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(optimizer.state[p]["uncertainty"], deviation, rtol=1e-5, atol=1e-9)


def test_averages_leave_the_update_alone() -> None:
    ours, theirs = parameters((5, 3)), parameters((5, 3))
    train(FlexLoRAAdamW(ours, sensitivity=True), ours, range(10))
    train(FlexLoRAAdamW(theirs), theirs, range(10))
    assert torch.equal(ours[0], theirs[0])


def test_without_a_gradient_nothing_is_touched() -> None:
    trained, fresh, other = parameters((3, 2), (4,), (5,))
    optimizer = FlexLoRAAdamW([trained, fresh, other], weight_decay=0.1, sensitivity=True)
    train(optimizer, [trained, other], range(5))
    assert not optimizer.state.get(fresh)
    before, state = trained.detach().clone(), snapshot(optimizer, trained)
    trained.grad = None
    feed([other], 5)
    optimizer.step()
    assert torch.equal(trained, before)
    assert all(torch.equal(optimizer.state[trained][key], value) for key, value in state.items())
    assert float(optimizer.state[other]["step"]) == 6
    for p in (trained, fresh, other):
        p.grad = None
    everything = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert str(optimizer.state_dict()) == str(everything)


def test_a_step_of_zero_gradients_makes_the_state_and_moves_nothing() -> None:
    # DeepSpeed's low-precision wrappers take such a step in their constructor.
    p, empty = parameters((3, 2), (0,))
    before = p.detach().clone()
    optimizer = FlexLoRAAdamW([p, empty], sensitivity=True)
    p.grad, empty.grad = torch.zeros_like(p), torch.zeros_like(empty)
    optimizer.step()
    assert torch.equal(p, before)
    for each in (p, empty):
        state = optimizer.state[each]
        assert set(state) == {"step", *optimizer.state_keys()}
        assert all(state[key].shape == each.shape for key in optimizer.state_keys())
        assert state["step"].shape == () and float(state["step"]) == 1
        assert torch.equal(state["age"], torch.ones_like(each))


def test_low_precision_parameters_keep_full_precision_state() -> None:
    low = parameters((6, 5), dtype=torch.bfloat16)
    high = [nn.Parameter(low[0].detach().float())]
    optimizers = [FlexLoRAAdamW(low, lr=1e-2), FlexLoRAAdamW(high, lr=1e-2)]
    for step in range(5):
        feed(low, step)
        assert low[0].grad is not None
        high[0].grad = low[0].grad.float()
        with torch.no_grad():
            high[0].copy_(low[0])
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(low[0], high[0].bfloat16())
    for key in optimizers[0].state_keys():
        assert optimizers[0].state[low[0]][key].dtype == torch.float32
        assert torch.equal(optimizers[0].state[low[0]][key], optimizers[1].state[high[0]][key])
    (double,) = parameters((3,), dtype=torch.float64)
    train(optimizer := FlexLoRAAdamW([double]), [double], range(1))
    assert optimizer.state[double]["exp_avg"].dtype == torch.float64


def test_state_dict_continues_exactly() -> None:
    params = parameters((4, 3), (3,))
    optimizer = FlexLoRAAdamW(params, weight_decay=0.1, sensitivity=True)
    train(optimizer, params, range(7))
    optimizer.state[params[0]]["age"][:, 1] = 2.0
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = FlexLoRAAdamW(copies, sensitivity=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, range(7, 15))
    train(resumed, copies, range(7, 15))
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, resumed.state[q][key]) for key, value in snapshot(optimizer, p).items())


def test_closures_and_refusals() -> None:
    (p,) = parameters((2,))
    optimizer = FlexLoRAAdamW([p])

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    assert optimizer.step(closure) > p.square().sum().item()
    for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=r"must not|between"):
            FlexLoRAAdamW([p], **bad)
    p.grad = torch.eye(2)[0].to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("count", [1, 15, 33, 2**17 + 5])
@pytest.mark.parametrize("age", [0, 1, 999])
def test_one_age_for_all_elements_keeps_every_bit(count: int, age: int) -> None:
    """Where a partition is cut decides which elements share an age with all of their run: no bit may depend on it."""
    results = []
    for odd in (False, True):
        generator = torch.Generator().manual_seed(1)
        p = torch.nn.Parameter(torch.randn(count + 1, generator=generator))
        p.grad = torch.randn(count + 1, generator=generator)
        optimizer = FlexLoRAAdamW([p], lr=1e-2)
        optimizer.step()
        optimizer.state[p]["age"].fill_(age)
        if odd:
            optimizer.state[p]["age"][-1] = 7
        optimizer.step()
        results.append(p.detach()[:count].clone())
    assert torch.equal(*results)


def test_a_low_precision_parameters_state_is_loaded_in_full() -> None:
    """In bfloat16 an age would end at 256."""
    (p,) = parameters((4, 3), dtype=torch.bfloat16)
    optimizer = FlexLoRAAdamW([p], lr=1e-2)
    train(optimizer, [p], range(3))
    optimizer.state[p]["age"].fill_(301)
    q = nn.Parameter(p.detach().clone())
    resumed = FlexLoRAAdamW([q], lr=1e-2)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed.load_state_dict(saved)
    assert all(
        torch.equal(value, resumed.state[q][key]) and value.dtype == resumed.state[q][key].dtype
        for key, value in snapshot(optimizer, p).items()
    )
    train(optimizer, [p], range(3, 6))
    train(resumed, [q], range(3, 6))
    assert torch.equal(p, q) and float(resumed.state[q]["age"].max()) == 304
    assert float(saved["state"][0]["age"].max()) == 301, "what is loaded from stays as it was"


def test_a_copy_goes_on_as_its_original() -> None:
    params = parameters((4, 3), (3,))
    optimizer = FlexLoRAAdamW(params, per_element_age=False, sensitivity=True, sensitivity_betas=(0.5, 0.6))
    train(optimizer, params, range(3))
    copies, other = copy.deepcopy((params, optimizer))
    assert other.state_keys() == optimizer.state_keys() and other.sensitivity_betas == (0.5, 0.6)
    train(optimizer, params, range(3, 6))
    train(other, copies, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
