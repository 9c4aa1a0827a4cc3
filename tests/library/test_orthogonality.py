"""The regulariser: values, gradients and the decoupled change against autograd and the singular values."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexlora_ds.orthogonality import decoupled_change, penalty, penalty_gradients, violation


def drawn(
    out: int, rank: int, features: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    P = torch.randn(out, rank, generator=generator, dtype=torch.float64) / out**0.5
    Q = torch.randn(rank, features, generator=generator, dtype=torch.float64) / features**0.5
    return P.to(dtype), Q.to(dtype)


def orthonormal(rows: int, rank: int) -> Tensor:
    """Columns of the identity: orthonormal without any rounding."""
    return torch.eye(rows)[:, :rank]


def autograd_twin(P: Tensor, Q: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    P, Q = P.clone().requires_grad_(), Q.clone().requires_grad_()
    squares = [(gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum() for gram in (P.T @ P, Q @ Q.T)]
    value = sum(square.sqrt() if form == "norm" else square for square in squares)
    assert isinstance(value, Tensor)
    value.backward()  # type: ignore[no-untyped-call]
    assert P.grad is not None and Q.grad is not None
    return value.detach(), P.grad, Q.grad


@settings(max_examples=50, deadline=None)
@given(
    out=st.integers(1, 40),
    features=st.integers(1, 40),
    rank=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    form=st.sampled_from(["norm", "squared"]),
)
def test_value_and_gradient_are_autograds(out: int, features: int, rank: int, seed: int, form: str) -> None:
    P, Q = drawn(out, rank, features, seed)
    value, grad_p, grad_q = autograd_twin(P, Q, form)
    torch.testing.assert_close(penalty(P, Q, form), value)
    ours = penalty_gradients(P, Q, form)
    torch.testing.assert_close(ours[0], grad_p, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(ours[1], grad_q, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_gradient_is_exactly_zero_where_nothing_is_violated(form: str) -> None:
    P, Q = orthonormal(12, 4), orthonormal(9, 4).T
    assert penalty(P, Q, form) == 0
    for gradient in penalty_gradients(P, Q, form):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_norms_gradient_keeps_its_length_while_the_squares_fades() -> None:
    base = orthonormal(12, 4)
    lengths = {"norm": [], "squared": []}  # type: dict[str, list[float]]
    for scale in (1e-1, 1e-3):
        for form, values in lengths.items():
            values.append(float(penalty_gradients(base * (1 + scale), base.T, form)[0].norm()))
    assert lengths["norm"][1] == pytest.approx(lengths["norm"][0], rel=0.1)
    assert lengths["squared"][1] < 0.02 * lengths["squared"][0]


def test_violation_of_known_matrices() -> None:
    P, Q = 2 * orthonormal(10, 4), orthonormal(8, 4).T
    p, q = violation(P, Q)
    assert float(p) == pytest.approx(6.0)  # four diagonal entries of 4 − 1
    assert float(q) == 0.0
    assert violation(P.bfloat16(), Q.bfloat16())[0].dtype == torch.float32


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), eta=st.floats(0, 0.5))
def test_decoupled_change_moves_singular_values_only(seed: int, eta: float) -> None:
    P, Q = drawn(30, 5, 20, seed)
    before = P.clone(), Q.clone()
    changed = decoupled_change(P, Q, eta)
    assert torch.equal(P, before[0]) and torch.equal(Q, before[1])
    for old, new in zip((P, Q), changed, strict=True):
        u, sigma, vh = torch.linalg.svd(old, full_matrices=False)
        expected = u * (sigma - eta * sigma * (sigma**2 - 1)) @ vh
        torch.testing.assert_close(new, expected, atol=1e-12, rtol=1e-9)


def test_decoupled_change_converges_and_rests_there() -> None:
    P, Q = drawn(64, 8, 48, seed=1, dtype=torch.float32)
    history = [float(sum(violation(P, Q)))]
    for _ in range(200):
        P, Q = decoupled_change(P, Q, 0.05)
        history.append(float(sum(violation(P, Q))))
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(history))
    assert history[0] > 0.5 and history[-1] < 1e-5
    fixed = orthonormal(12, 4), orthonormal(9, 4).T
    assert all(torch.equal(a, b) for a, b in zip(decoupled_change(*fixed, 0.3), fixed, strict=True))
