"""How much a matrix matters: its spectrum λ -> a score, one small function per metric. Pure."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import RunError, UserError

EPSILON = 1e-8
"""ε inside the logarithm of the entropy."""


@dataclass(frozen=True)
class MatrixStatistics:
    """What a metric may look at for one matrix of rank r."""

    spectrum: Tensor
    """λ, or the true singular values; [r], float64 on the CPU."""
    sensitivity: Tensor | None = None
    """`direction_sensitivity` of each direction, [r], for the metric of that name."""
    draw: str = ""
    """Seed of the `random` control: the run's seed, the step, the matrix."""


@dataclass(frozen=True)
class Metric:
    """A score and the fewest directions for which it is defined."""

    score: Callable[[MatrixStatistics], float]
    least_directions: int = 1


def spectral_entropy(lam: Tensor) -> float:
    """Normalised entropy of the energies of a spectrum (the paper's Eq. 3).

    `-(1/ln r) Σ s_i ln(s_i + ε)` with `s_i = λ_i² / Σ λ_j²`, in [0, 1]: 0 where one direction holds all the
    energy, where all λ are zero, and where r < 2 leaves it undefined; 1 where all hold the same.

    Args:
        lam: [r], any floating dtype and device; computed in float64.

    Raises:
        RunError: λ is not finite.
    """
    spectrum = _as_float64(lam)
    if spectrum.numel() < 2:
        return 0.0
    terms = _entropy_terms(spectrum)
    return min(1.0, max(0.0, float(terms.sum()) / math.log(spectrum.numel())))


def score_matrices(
    spectra: Mapping[str, Tensor],
    config: FlexLoRAConfig,
    *,
    mature: Mapping[str, Tensor] | None = None,
    sensitivity: Mapping[str, Tensor] | None = None,
    step: int = 0,
) -> dict[str, float]:
    """Score every matrix with `config.importance`, in the order of `spectra`; every score is finite.

    A matrix with too few directions for the metric (rank 1 has no entropy) is scored by `config.rank_one`:
    `neutral` gives it the median of the others, `lowest` 0, `expand` more than any other has.

    Args:
        spectra: λ or the true singular values of each matrix, [r].
        mature: for `grace`, a boolean [r] per matrix: the directions that count. None: all do. True singular
            values have no directions to mask: give `exact_spectrum` the mature ones instead.
        sensitivity: `direction_sensitivity` of each matrix, [r]; needed by the metric of that name only.
        step: makes the `random` control draw anew at every change.

    Raises:
        RunError: a spectrum or a sensitivity is not finite (the matrix is named).
        UserError: `importance` is growth, which reads gradients and no spectrum; or sensitivities are missing.
    """
    if config.importance not in METRICS:
        raise UserError(
            f"importance {config.importance} scores no spectrum",
            "score_matrices",
            "use RankController, or another importance",
        )
    if config.importance == "sensitivity" and (sensitivity is None or set(spectra) - set(sensitivity)):
        raise UserError(
            "importance sensitivity needs the sensitivity of every matrix",
            "score_matrices",
            "give direction_sensitivity of the optimizer's averages",
        )
    metric = METRICS[config.importance]
    scores: dict[str, float | None] = {}
    for name, spectrum in spectra.items():
        keep = slice(None) if mature is None else mature[name].cpu()
        matrix = MatrixStatistics(
            spectrum=_as_float64(spectrum, name)[keep],
            sensitivity=None if sensitivity is None else _as_float64(sensitivity[name], name)[keep],
            draw=f"{config.seed}/{step}/{name}",
        )
        defined = matrix.spectrum.numel() >= metric.least_directions
        scores[name] = metric.score(matrix) if defined else None
    return _fill_undefined(scores, config.rank_one)


def not_expandable(spectra: Mapping[str, Tensor], config: FlexLoRAConfig) -> frozenset[str]:
    """The matrices whose energy Σλ² lies below the `expand_min_energy` quantile of all of them.

    The quantile is interpolated linearly; 0 (the default) leaves every matrix expandable.

    Raises:
        RunError: a spectrum is not finite.
    """
    if config.expand_min_energy == 0 or not spectra:
        return frozenset()
    energies = {name: float(_as_float64(lam, name).square().sum()) for name, lam in spectra.items()}
    values = torch.tensor(list(energies.values()), dtype=torch.float64)
    bound = float(torch.quantile(values, config.expand_min_energy))
    return frozenset(name for name, energy in energies.items() if energy < bound)


def exact_spectrum(gram_p: Tensor, gram_q: Tensor, lam: Tensor) -> Tensor:
    """True singular values of `P diag(λ) Q`, from its Gram matrices alone.

    With `P = U A` and `Q = Bᵀ V` (U, Vᵀ with orthonormal columns, `AᵀA = PᵀP`, `BᵀB = QQᵀ`) they are those of
    the r × r matrix `A diag(λ) Bᵀ`.

    Args:
        gram_p: PᵀP, [r, r].
        gram_q: QQᵀ, [r, r].
        lam: λ, [r].

    Returns:
        [r], descending, float64 on the CPU.

    Raises:
        RunError: an argument is not finite.
    """
    lam = _as_float64(lam)
    values: Tensor = torch.linalg.svdvals(_gram_root(gram_p) * lam @ _gram_root(gram_q).T)
    return values


def spectrum_error(lam: Tensor, exact: Tensor) -> float:
    """How far the sorted |λ| are from the true singular values: the worst relative difference, in [0, 1].

    Each difference is relative to the larger of its two values; pairs below 1e-10 of the largest value are
    rounding and count by that floor.

    Args:
        lam: λ, [r].
        exact: `exact_spectrum` of the same matrix, [r].
    """
    ours = _as_float64(lam).abs().sort(descending=True).values
    true = _as_float64(exact).sort(descending=True).values
    larger = torch.maximum(ours, true)
    if larger.numel() == 0 or larger[0] == 0:
        return 0.0
    return float(((ours - true).abs() / larger.clamp_min(1e-10 * float(larger[0]))).max())


def direction_sensitivity(p_scores: Tensor, lam_scores: Tensor, q_scores: Tensor) -> Tensor:
    """Score of each direction from per-element scores (sensitivity × uncertainty, Eqs. 5 and 6).

    λ's own score, plus the mean over its column of P, plus the mean over its row of Q.

    Args:
        p_scores: [out, r].
        lam_scores: [r].
        q_scores: [r, in].

    Returns:
        [r].
    """
    return lam_scores + p_scores.mean(dim=0) + q_scores.mean(dim=1)


def _nuclear(matrix: MatrixStatistics) -> float:
    return float(matrix.spectrum.abs().mean())


def _frobenius(matrix: MatrixStatistics) -> float:
    return float(torch.linalg.vector_norm(matrix.spectrum)) / matrix.spectrum.numel()


def _sensitivity(matrix: MatrixStatistics) -> float:
    assert matrix.sensitivity is not None, "score_matrices asks for it"
    return float(matrix.sensitivity.mean())


def _elem_energy_entropy(matrix: MatrixStatistics) -> float:
    terms = _entropy_terms(matrix.spectrum) * matrix.spectrum.square()
    return max(0.0, float(terms.sum())) / math.log(matrix.spectrum.numel())


def _matrix_energy_entropy(matrix: MatrixStatistics) -> float:
    return float(matrix.spectrum.square().sum()) * spectral_entropy(matrix.spectrum)


METRICS: dict[str, Metric] = {
    "entropy": Metric(lambda matrix: spectral_entropy(matrix.spectrum), least_directions=2),
    "nuclear": Metric(_nuclear),
    "frobenius": Metric(_frobenius),
    "sensitivity": Metric(_sensitivity),
    "elem_energy_entropy": Metric(_elem_energy_entropy, least_directions=2),
    "matrix_energy_entropy": Metric(_matrix_energy_entropy, least_directions=2),
    "random": Metric(lambda matrix: random.Random(matrix.draw).random(), least_directions=0),
    "reversed": Metric(lambda matrix: 1.0 - spectral_entropy(matrix.spectrum), least_directions=2),
}
"""Every metric by its name in `config.importance`; `growth` is none of a spectrum (`rank_changes.market`)."""


def _entropy_terms(spectrum: Tensor) -> Tensor:
    """`-s_i ln(s_i + ε)`, [r]; zeros for a spectrum of zeros."""
    largest = spectrum.abs().max()
    if largest == 0:
        return torch.zeros_like(spectrum)
    energies = (spectrum / largest).square()  # scaled first: the square of a tiny value would underflow
    shares = energies / energies.sum()
    return -shares * torch.log(shares + EPSILON)


def _fill_undefined(scores: Mapping[str, float | None], rank_one: str) -> dict[str, float]:
    defined = [score for score in scores.values() if score is not None]
    if rank_one == "expand":
        substitute = max([1.0, *defined]) + 1.0
    elif rank_one == "neutral" and defined:
        substitute = statistics.median(defined)
    else:
        substitute = 0.0
    return {name: substitute if score is None else score for name, score in scores.items()}


def _gram_root(gram: Tensor) -> Tensor:
    """A with `AᵀA = gram`, [r, r]: Cholesky's factor, or where directions depend on each other one of eigenvectors."""
    gram = _as_float64(gram)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        triangle: Tensor = factor.T
        return triangle
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = values.clamp_min(0).sqrt()[:, None] * vectors.T
    return root


def _as_float64(values: Tensor, name: str = "λ") -> Tensor:
    values = values.detach().cpu().double()
    if not torch.isfinite(values).all():
        raise RunError("a spectrum is not finite", name, "look for a diverged loss before this step")
    return values
