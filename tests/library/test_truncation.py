"""One adapter at any size: beside the brute-force choice over the singular values of ΔW itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexlora_ds.errors import UserError
from flexlora_ds.exports.truncation import Size, kept_ranks, truncate
from flexlora_ds.peft_format import LoraAdapter, LoraMatrix

SHAPES = {"a": (40, 24, 6), "b": (16, 50, 3), "c": (30, 30, 1)}


def adapter(seed: int = 0) -> LoraAdapter:
    """Three matrices whose factors are far from orthogonal."""
    rng = torch.Generator().manual_seed(seed)
    matrices = {
        name: LoraMatrix(
            torch.randn(out, r, generator=rng), torch.randn(r, width, generator=rng), 0.5 + 0.1 * r
        )
        for name, (out, width, r) in SHAPES.items()
    }
    return LoraAdapter(matrices, "base")


def values(whole: LoraAdapter) -> dict[str, list[float]]:
    return {n: torch.linalg.svdvals(m.delta().double())[: m.rank].tolist() for n, m in whole.matrices.items()}


@pytest.mark.parametrize("total", [3, 5, 8, 10, 99])
@pytest.mark.parametrize("min_rank", [0, 1])
def test_the_largest_singular_values_stay(total: int, min_rank: int) -> None:
    whole = adapter()
    result = truncate(whole, Size(total_rank=total, min_rank=min_rank))
    spectra = values(whole)
    ranks = {name: matrix.rank for name, matrix in result.adapter.matrices.items()}
    assert sum(ranks.values()) == min(total, 10)
    dropped = [v for n, sigma in spectra.items() for v in sigma[ranks.get(n, 0) :]]
    kept = [v for n, sigma in spectra.items() for v in sigma[min_rank : ranks.get(n, 0)]]
    assert not dropped or not kept or min(kept) >= max(dropped), "one threshold for all"
    for name, matrix in result.adapter.matrices.items():
        U, S, V = torch.linalg.svd(whole.matrices[name].delta().double(), full_matrices=False)
        k = ranks[name]
        nearest = U[:, :k] * S[:k] @ V[:k]
        assert (matrix.delta().double() - nearest).abs().max() < 1e-5
        assert matrix.scale == whole.matrices[name].scale
    energy = sum(v**2 for n, s in spectra.items() for v in s[: ranks.get(n, 0)])
    assert result.energy == pytest.approx(energy / sum(v**2 for s in spectra.values() for v in s))


def test_all_of_it_is_the_same_update() -> None:
    whole = adapter()
    result = truncate(whole, Size(energy=1.0))
    assert result.directions == (10, 10) and result.energy == pytest.approx(1)
    for name, matrix in result.adapter.matrices.items():
        assert (matrix.delta() - whole.matrices[name].delta()).abs().max() < 1e-5


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_the_fewest_directions_with_the_energy_asked_for(share: float) -> None:
    whole = adapter()
    result = truncate(whole, Size(energy=share, min_rank=0))
    every = sorted((v**2 for s in values(whole).values() for v in s), reverse=True)
    fewest = next(k for k in range(1, 11) if sum(every[:k]) >= share * sum(every))
    assert result.directions[0] == fewest
    assert result.energy >= share


def test_parameters_are_counted_as_they_are_stored() -> None:
    result = truncate(adapter(), Size(parameters=400))
    stored = sum(m.B.numel() + m.A.numel() for m in result.adapter.matrices.values())
    assert result.parameters == (stored, 6 * 64 + 3 * 66 + 60) and stored <= 400


@given(st.integers(1, 12), st.integers(0, 2))
def test_never_more_than_the_budget(total: int, min_rank: int) -> None:
    spectra = {"a": [5.0, 2.0, 2.0, 0.0], "b": [4.0, 2.0], "c": [0.0, 0.0, 0.0]}
    costs = {"a": 10, "b": 20, "c": 30}
    floor = sum(min(min_rank, len(s)) for s in spectra.values())
    if total < floor:
        with pytest.raises(UserError, match=f"give at least {floor}, or --min_rank 0"):
            kept_ranks(spectra, costs, Size(total_rank=total, min_rank=min_rank))
        return
    ranks = kept_ranks(spectra, costs, Size(total_rank=total, min_rank=min_rank))
    assert sum(ranks.values()) == min(total, 9)
    assert all(min(min_rank, len(spectra[n])) <= r <= len(spectra[n]) for n, r in ranks.items())


def test_equal_values_go_by_the_order_of_the_matrices() -> None:
    ranks = kept_ranks({"a": [1.0, 1.0], "b": [1.0, 1.0]}, {"a": 1, "b": 1}, Size(total_rank=3, min_rank=0))
    assert ranks == {"a": 2, "b": 1}


def test_a_size_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"keeps no direction of any matrix \(--parameters\); give a larger one"
    ):
        kept_ranks({"a": [1.0]}, {"a": 10}, Size(parameters=9, min_rank=0))


def test_an_adapter_of_alpha_0_stays_nothing() -> None:
    whole = adapter()
    silent = replace(whole, matrices={n: replace(m, scale=0.0) for n, m in whole.matrices.items()})
    result = truncate(silent, Size(total_rank=5))
    assert all(torch.equal(m.delta(), torch.zeros_like(m.delta())) for m in result.adapter.matrices.values())
