"""Scores against an oracle in 60 decimal digits, closed forms and dense singular values."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexlora_ds.config import CHOICES, FlexLoRAConfig
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.importance import (
    METRICS,
    direction_sensitivity,
    exact_spectrum,
    not_expandable,
    score_matrices,
    spectral_entropy,
    spectrum_error,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def oracle_terms(lam: Tensor) -> list[Decimal]:
    """`-s_i ln(s_i + 1e-8)` of the very values that the tensor holds."""
    energies = [Decimal(value) ** 2 for value in lam.double().tolist()]
    total = sum(energies)
    if total == 0:
        return [Decimal(0) for _ in energies]
    return [-(energy / total) * (energy / total + Decimal("1e-8")).ln() for energy in energies]


def oracle_entropy(lam: Tensor) -> float:
    if lam.numel() < 2:
        return 0.0
    with localcontext() as context:
        context.prec = 60
        entropy = sum(oracle_terms(lam)) / Decimal(lam.numel()).ln()
    return min(1.0, max(0.0, float(entropy)))


def check_entropy(lam: Tensor) -> float:
    entropy = spectral_entropy(lam)
    assert math.isfinite(entropy) and 0.0 <= entropy <= 1.0
    assert entropy == pytest.approx(oracle_entropy(lam), abs=1e-6)
    return entropy


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3) | st.just(0.0), min_size=1, max_size=40),
    power=st.sampled_from([0, -10, -20, -30, 10]),
    dtype=st.sampled_from(DTYPES),
)
def test_entropy_is_the_oracles(values: list[float], power: int, dtype: torch.dtype) -> None:
    lam = (torch.tensor(values, dtype=torch.float64) * 10.0**power).to(dtype)
    if torch.isfinite(lam).all():  # float16 overflows
        check_entropy(lam)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 3, 8, 32, 128])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-30])
def test_entropy_of_extreme_spectra(dtype: torch.dtype, rank: int, scale: float) -> None:
    one_hot = torch.zeros(rank, dtype=dtype)
    one_hot[rank // 2] = scale
    equal = torch.full((rank,), -scale, dtype=dtype)
    assert check_entropy(torch.zeros(rank, dtype=dtype)) == 0.0
    assert check_entropy(one_hot) == 0.0
    if rank > 1 and float(equal[0]) != 0:  # float16 has no 1e-30
        # ε lowers an even spectrum by ε·r/ln r.
        assert check_entropy(equal) == pytest.approx(1.0, abs=1.01e-8 * rank / math.log(rank))  # what ε takes
    check_entropy(one_hot + 1e-30)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=16), scale=st.floats(1e-3, 1e3))
def test_entropy_ignores_sign_order_and_scale(values: list[float], scale: float) -> None:
    lam = torch.tensor(values, dtype=torch.float64)
    entropy = spectral_entropy(lam)
    assert spectral_entropy(-lam.flip(0) * scale) == pytest.approx(entropy, abs=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error_that_names_the_matrix(bad: float) -> None:
    spectra = {"fine": torch.ones(2), "layers.3.q_proj": torch.tensor([1.0, bad])}
    with pytest.raises(RunError, match=r"layers\.3\.q_proj"):
        score_matrices(spectra, FlexLoRAConfig())


def scored(spectra: dict[str, list[float]], config: FlexLoRAConfig) -> dict[str, float]:
    return score_matrices({name: torch.tensor(values) for name, values in spectra.items()}, config)


def test_metrics_have_their_closed_forms() -> None:
    lam = [3.0, -4.0]
    shares = [9 / 25, 16 / 25]
    terms = [-share * math.log(share + 1e-8) / math.log(2) for share in shares]
    expected = {
        "entropy": sum(terms),
        "reversed": 1 - sum(terms),
        "nuclear": 7 / 2,
        "frobenius": 5 / 2,
        "elem_energy_entropy": 9 * terms[0] + 16 * terms[1],
        "matrix_energy_entropy": 25 * sum(terms),
    }
    for name, value in expected.items():
        config = FlexLoRAConfig(importance=name)  # type: ignore[arg-type]
        assert scored({"m": lam}, config)["m"] == pytest.approx(value, abs=1e-12), name
    assert set(METRICS) == set(CHOICES["importance"]) - {"growth"} == {*expected, "random", "sensitivity"}


@pytest.mark.parametrize("name", ["elem_energy_entropy", "matrix_energy_entropy", "nuclear", "frobenius"])
def test_a_spectrum_of_zeros_scores_zero(name: str) -> None:
    assert scored({"m": [0.0] * 4}, FlexLoRAConfig(importance=name))["m"] == 0.0  # type: ignore[arg-type]


def test_random_control_depends_on_seed_step_and_name_alone() -> None:
    config = FlexLoRAConfig(importance="random", seed=7)
    spectra = {f"m{i}": torch.ones(i + 1) for i in range(20)}
    first = score_matrices(spectra, config, step=100)
    shuffled = dict(reversed([(name, lam * 5) for name, lam in spectra.items()]))
    assert score_matrices(shuffled, config, step=100) == first
    assert score_matrices(spectra, config, step=200) != first
    assert score_matrices(spectra, FlexLoRAConfig(importance="random", seed=8), step=100) != first
    assert len(set(first.values())) == 20 and all(0 <= value < 1 for value in first.values())


def test_sensitivity_is_the_mean_over_directions_of_the_sum_of_three() -> None:
    generator = torch.Generator().manual_seed(0)
    p, lam, q = (torch.rand(shape, generator=generator) for shape in ((6, 3), (3,), (3, 5)))
    per_direction = direction_sensitivity(p, lam, q)
    for i in range(3):
        column = sum(p[:, i].tolist()) / 6
        row = sum(q[i].tolist()) / 5
        assert float(per_direction[i]) == pytest.approx(float(lam[i]) + column + row, rel=1e-6)
    config = FlexLoRAConfig(importance="sensitivity")
    scores = score_matrices({"m": lam}, config, sensitivity={"m": per_direction})
    assert scores["m"] == pytest.approx(sum(per_direction.tolist()) / 3)


@pytest.mark.parametrize(
    ("rule", "expected"), [("neutral", 0.5 * (1.0 + 0.9427)), ("lowest", 0.0), ("expand", 2.0)]
)
def test_rank_one_rules(rule: str, expected: float) -> None:
    spectra = {"even": [1.0, 1.0], "one": [5.0], "uneven": [3.0, 4.0]}
    config = FlexLoRAConfig(rank_one=rule)  # type: ignore[arg-type]
    scores = scored(spectra, config)
    assert list(scores) == list(spectra)
    assert scores["one"] == pytest.approx(expected, abs=1e-4)
    assert scores["even"] == pytest.approx(1.0, abs=1e-6)
    others = [scores["even"], scores["uneven"]]
    assert {
        "neutral": min(others) <= scores["one"] <= max(others),
        "lowest": scores["one"] <= min(others),
    }.get(rule, scores["one"] > max(others))


def test_rank_one_alone_and_metrics_defined_there() -> None:
    assert scored({"a": [1.0], "b": [2.0]}, FlexLoRAConfig()) == {"a": 0.0, "b": 0.0}
    assert scored({"a": [1.0], "b": [-2.0, 4.0]}, FlexLoRAConfig(importance="nuclear")) == {
        "a": 1.0,
        "b": 3.0,
    }
    energetic = FlexLoRAConfig(importance="matrix_energy_entropy", rank_one="expand")
    scores = scored({"a": [1.0], "b": [100.0, 100.0]}, energetic)
    assert scores["a"] > scores["b"] > 1000


def test_young_directions_do_not_count() -> None:
    lam = torch.tensor([3.0, 0.0, 4.0, 1e-9])
    mature = torch.tensor([True, False, True, False])
    for name in sorted(METRICS):
        config = FlexLoRAConfig(importance=name)  # type: ignore[arg-type]
        sensitivity = torch.arange(4.0)
        masked = score_matrices({"m": lam}, config, mature={"m": mature}, sensitivity={"m": sensitivity})
        alone = score_matrices({"m": lam[mature]}, config, sensitivity={"m": sensitivity[mature]})
        assert masked == alone, name
    spectra = {"young": lam, "old": lam}
    none_left = {"young": torch.zeros(4, dtype=torch.bool), "old": mature}
    for name in ("entropy", "nuclear"):
        scores = score_matrices(spectra, FlexLoRAConfig(importance=name), mature=none_left)  # type: ignore[arg-type]
        assert scores["young"] == scores["old"]  # undefined, so neutral


def test_the_weakest_matrices_may_not_grow() -> None:
    spectra = {f"m{i}": torch.tensor([float(i), 0.0]) for i in range(5)}  # energies 0, 1, 4, 9, 16
    assert not_expandable(spectra, FlexLoRAConfig()) == frozenset()
    assert not_expandable(spectra, FlexLoRAConfig(expand_min_energy=0.5)) == {"m0", "m1"}
    assert not_expandable(spectra, FlexLoRAConfig(expand_min_energy=1.0)) == {"m0", "m1", "m2", "m3"}
    equal = {name: torch.ones(2) for name in spectra}
    assert not_expandable(equal, FlexLoRAConfig(expand_min_energy=1.0)) == frozenset()


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 30), features=st.integers(1, 30), rank=st.integers(1, 8), seed=st.integers(0, 10**6)
)
def test_exact_spectrum_is_the_dense_one(out: int, features: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    P, lam, Q = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((out, rank), (rank,), (rank, features))
    )
    P[:, 0] *= seed % 2  # every other case has a direction of zeros
    ours = exact_spectrum(P.T @ P, Q @ Q.T, lam)
    dense = torch.linalg.svdvals(P * lam @ Q)
    expected = torch.zeros(rank, dtype=torch.float64)
    expected[: min(rank, len(dense))] = dense[:rank]
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)  # √ of a Gram halves the digits of zero


def test_exact_spectrum_is_lambda_where_directions_are_orthonormal() -> None:
    lam = torch.tensor([1e-6, -2.0, 0.5, 0.0])
    exact = exact_spectrum(torch.eye(4), torch.eye(4), lam)
    assert exact.tolist() == pytest.approx([2.0, 0.5, 1e-6, 0.0], rel=1e-6)
    assert spectrum_error(lam, exact) < 1e-6


def test_spectrum_error_is_the_worst_relative_difference() -> None:
    lam = torch.tensor([-1.0, 4.0, 2.0])
    assert spectrum_error(lam, torch.tensor([4.0, 2.0, 1.0])) == 0.0
    assert spectrum_error(lam, torch.tensor([5.0, 2.0, 1.0])) == pytest.approx(0.2)
    assert spectrum_error(lam, torch.tensor([4.0, 2.0, 0.5])) == pytest.approx(0.5)
    assert spectrum_error(torch.zeros(3), torch.zeros(3)) == 0.0
    scaled = exact_spectrum(1.21 * torch.eye(3), torch.eye(3), lam)
    assert spectrum_error(lam, scaled) == pytest.approx(1 - 1 / 1.1, rel=1e-5)


def test_what_a_metric_lacks_is_said_in_one_line() -> None:
    spectra = {"a": torch.ones(2), "b": torch.ones(2)}
    growth = FlexLoRAConfig(importance="growth", new_direction="gradient")
    with pytest.raises(UserError, match=r"growth scores no spectrum \(score_matrices\); use RankController"):
        score_matrices(spectra, growth)
    for sensitivity in (None, {}, {"a": torch.ones(2)}):
        with pytest.raises(UserError, match="needs the sensitivity of every matrix"):
            score_matrices(spectra, FlexLoRAConfig(importance="sensitivity"), sensitivity=sensitivity)
