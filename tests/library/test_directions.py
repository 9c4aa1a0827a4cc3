"""What a direction begins with and which one goes: every law of `new_direction`, on values alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters
from flexlora_ds.adapter.layer import AdaptedLinear
from flexlora_ds.directions import MASTER, SMALL_LAMBDA, matrix_edits, smallest_directions

OUT, IN, RANK = 40, 24, 5
LAWS = ("zero_impact", "small", "zero", "orthogonal")
Values = dict[str, Tensor]


def layer_and_config(rank: int = RANK, **options: Any) -> tuple[AdaptedLinear, FlexLoRAConfig]:
    """One adapted matrix with λ drawn at random, in fp32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT))
    config = FlexLoRAConfig(**{"rank": rank, "dropout": 0.0, "target_modules": ("0",), **options})
    inject_adapters(model, config)
    layer = adapters(model)["0"]
    layer.lam.data.normal_()
    return layer, config


def changed(
    layer: AdaptedLinear, config: FlexLoRAConfig, keep: list[int], added: int, step: int = 7
) -> Values:
    edits = matrix_edits(layer, keep, added, config, step)
    return {
        role: edits[getattr(layer, role)](getattr(layer, role).data, MASTER) for role in ("P", "lam", "Q")
    }


def terms(values: Values) -> Tensor:
    """Σ λ_i p_i q_iᵀ summed direction by direction, so that no other order of summation enters."""
    total = torch.zeros(len(values["P"]), values["Q"].shape[1])
    for i in range(len(values["lam"])):
        total = total + values["lam"][i] * torch.outer(values["P"][:, i], values["Q"][i])
    return total


def before(layer: AdaptedLinear) -> Values:
    return {"P": layer.P.data, "lam": layer.lam.data, "Q": layer.Q.data}


@pytest.mark.parametrize("law", ["zero_impact", "zero", "orthogonal"])
@pytest.mark.parametrize("added", [1, 3])
def test_growth_leaves_the_update_exactly_as_it_is(law: str, added: int) -> None:
    layer, config = layer_and_config(new_direction=law)
    grown = changed(layer, config, list(range(RANK)), added)
    assert [tuple(v.shape) for v in grown.values()] == [
        (OUT, RANK + added),
        (RANK + added,),
        (RANK + added, IN),
    ]
    assert float((terms(grown) - terms(before(layer))).abs().max()) == 0.0


@pytest.mark.parametrize("law", ["zero_impact", "zero", "orthogonal"])
def test_growth_leaves_the_output_exactly_as_it_is(law: str) -> None:
    layer, config = layer_and_config(new_direction=law)
    x = torch.randn(16, IN)
    with torch.no_grad():
        expected = layer(x)
        for role, value in changed(layer, config, list(range(RANK)), 1).items():
            getattr(layer, role).data = value
        assert layer.rank == RANK + 1
        assert float((layer(x) - expected).abs().max()) == 0.0


def test_a_small_direction_changes_the_update_by_its_lambda() -> None:
    layer, config = layer_and_config(new_direction="small")
    grown = changed(layer, config, list(range(RANK)), 1)
    assert grown["lam"][-1] == SMALL_LAMBDA == 1e-3
    new = SMALL_LAMBDA * torch.outer(grown["P"][:, -1], grown["Q"][-1])
    torch.testing.assert_close(terms(grown) - terms(before(layer)), new, rtol=0, atol=1e-6)


@pytest.mark.parametrize("law", LAWS)
def test_survivors_are_kept_bit_for_bit_in_their_order(law: str) -> None:
    layer, config = layer_and_config(new_direction=law)
    keep = [0, 2, 4]
    result = changed(layer, config, keep, 2)
    assert torch.equal(result["P"][:, :3], layer.P.data[:, keep])
    assert torch.equal(result["lam"][:3], layer.lam.data[keep])
    assert torch.equal(result["Q"][:3], layer.Q.data[keep])


@pytest.mark.parametrize("law", LAWS)
def test_the_law_of_the_new_vectors(law: str) -> None:
    layer, config = layer_and_config(new_direction=law)
    grown = changed(layer, config, list(range(RANK)), 2)
    assert torch.equal(grown["lam"][RANK:], torch.full((2,), 1e-3 if law == "small" else 0.0))
    for columns in (grown["P"], grown["Q"].T):
        old, new = columns[:, :RANK].double(), columns[:, RANK:].double()
        if law == "zero":
            assert torch.equal(new, torch.zeros_like(new))
            continue
        assert (new.norm(dim=0) > 0.3).all()
        if law != "zero_impact":
            torch.testing.assert_close(new.T @ new, torch.eye(2).double(), rtol=0, atol=1e-6)
            assert (old.T @ new).abs().max() < 1e-6
        else:
            assert (old.T @ new).abs().max() > 1e-3, "drawn without regard to the others"


@pytest.mark.parametrize(("std", "expected"), [(None, 1.0), (0.01, 0.01)])
def test_the_size_of_the_new_vectors(std: float | None, expected: float) -> None:
    """Unit norm on average by default; else the standard deviation that was asked for."""
    layer, config = layer_and_config(rank=1, new_direction_std=std)
    grown = changed(layer, config, [0], 400)
    for new, width in ((grown["P"][:, 1:], OUT), (grown["Q"][1:].T, IN)):
        sigma = expected if std is not None else width**-0.5
        assert new.std().item() == pytest.approx(sigma, rel=0.03)
        assert abs(new.mean().item()) < 0.05 * sigma


def test_orthogonal_directions_lie_in_what_was_drawn() -> None:
    """The draw of `zero_impact` made orthonormal: the same span beside the survivors."""
    layer, orthogonal = layer_and_config(new_direction="orthogonal")
    _, plain = layer_and_config(new_direction="zero_impact")
    keep = list(range(RANK))
    made, drawn = (changed(layer, c, keep, 2)["P"].double() for c in (orthogonal, plain))
    span = torch.linalg.qr(drawn)[0]
    outside = made[:, RANK:] - span @ (span.T @ made[:, RANK:])
    assert outside.abs().max() < 1e-6


def test_orthogonal_copes_with_survivors_that_depend_on_each_other() -> None:
    layer, config = layer_and_config(new_direction="orthogonal")
    layer.P.data[:, 1] = 2 * layer.P.data[:, 0]
    layer.P.data[:, 2] = 0
    grown = changed(layer, config, list(range(RANK)), 1)["P"].double()
    assert grown[:, -1].norm().item() == pytest.approx(1, abs=1e-6)
    assert (grown[:, :-1].T @ grown[:, -1]).abs().max() < 1e-6


def test_a_matrix_can_grow_to_its_full_rank() -> None:
    layer, config = layer_and_config(rank=IN - 1, new_direction="orthogonal")
    grown = changed(layer, config, list(range(IN - 1)), 1)["Q"].double()
    assert (grown[:-1] @ grown[-1]).abs().max() < 1e-6
    assert grown[-1].norm().item() == pytest.approx(1, abs=1e-6)


def test_the_draw_depends_on_seed_step_matrix_and_side_alone() -> None:
    layer, config = layer_and_config()
    grown = changed(layer, config, list(range(RANK)), 1)
    torch.manual_seed(99)
    assert torch.equal(changed(layer, config, [3], 1)["P"][:, -1], grown["P"][:, -1])
    assert not torch.equal(changed(layer, config, [3], 1, step=8)["P"][:, -1], grown["P"][:, -1])
    _, other = layer_and_config(seed=43)
    assert not torch.equal(changed(layer, other, [3], 1)["P"][:, -1], grown["P"][:, -1])
    assert not torch.equal(grown["P"][:IN, -1] * OUT**0.5, grown["Q"][-1] * IN**0.5)
    layer.name = "another"
    assert not torch.equal(changed(layer, config, [3], 1)["P"][:, -1], grown["P"][:, -1])


@pytest.mark.parametrize("moment", ["own_age", "zero", "survivor_mean"])
def test_the_state_of_new_directions(moment: str) -> None:
    """Moments are zero or the survivors' mean; the age, and what else is kept per element, is zero always."""
    layer, config = layer_and_config(new_moment=moment)
    keep = [0, 3]
    for role, axis in (("P", 1), ("lam", 0), ("Q", 0)):
        p = getattr(layer, role)
        edit = matrix_edits(layer, keep, 2, config, 7)[p]
        for key in ("exp_avg", "exp_avg_sq", "age", "sensitivity", "uncertainty"):
            whole = torch.rand_like(p)
            result = edit(whole, key)
            kept = whole.index_select(axis, torch.tensor(keep))
            assert edit.shape(tuple(p.shape)) == tuple(result.shape)
            assert torch.equal(result.narrow(axis, 0, 2), kept)
            new = result.narrow(axis, 2, 2)
            if moment == "survivor_mean" and key.startswith("exp_avg"):
                mean = kept.unbind(axis)[0] / 2 + kept.unbind(axis)[1] / 2
                for direction in new.unbind(axis):
                    torch.testing.assert_close(direction, mean)
            else:
                assert torch.equal(new, torch.zeros_like(new))


def test_pruning_alone_adds_nothing() -> None:
    layer, config = layer_and_config()
    result = changed(layer, config, [1, 2, 3, 4], 0)
    assert torch.equal(result["P"], layer.P.data[:, 1:])
    assert torch.equal(result["lam"], layer.lam.data[1:])
    assert torch.equal(result["Q"], layer.Q.data[1:])


def test_edits_keep_the_dtype_of_what_they_edit() -> None:
    layer, config = layer_and_config()
    edits = matrix_edits(layer, [0], 1, config, 7)
    assert edits[layer.P](layer.P.data.bfloat16(), MASTER).dtype == torch.bfloat16


def test_the_weakest_direction_is_the_smallest_not_the_most_negative() -> None:
    lam = torch.tensor([0.5, -0.9, -0.1, 0.3])
    everyone = [True] * 4
    assert smallest_directions(lam, 1, everyone) == [2]
    assert smallest_directions(lam, 3, everyone) == [2, 3, 0]
    assert smallest_directions(lam, 1, [True, True, False, True]) == [3]
    assert smallest_directions(lam, 1, [False] * 4) == []


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12).flatmap(
        lambda values: st.tuples(
            st.just(values),
            st.integers(0, len(values)),
            st.lists(st.booleans(), min_size=len(values), max_size=len(values)),
        )
    )
)
def test_no_direction_left_is_weaker_than_one_that_goes(case: tuple[list[float], int, list[bool]]) -> None:
    values, count, mature = case
    gone = smallest_directions(torch.tensor(values), count, mature)
    left = [i for i, old in enumerate(mature) if old and i not in gone]
    assert len(gone) == len(set(gone)) == min(count, sum(mature))
    assert all(mature[i] for i in gone)
    assert all((abs(values[g]), g) < (abs(values[i]), i) for g in gone for i in left)
