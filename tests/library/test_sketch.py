"""The singular pairs that thin products give, beside those of the whole matrix."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flexlora_ds.gradient.sketch import (
    leading_triples,
    one_pass_factors,
    outside_of,
    range_basis,
    sketch_width,
)
from tests.helpers.processes import ROOT


def matrix(out: int, width: int, sigma: list[float], noise: float = 0.01) -> Tensor:
    """Given leading singular values over a floor of noise."""
    rng = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(out, len(sigma), generator=rng))[0]
    right = torch.linalg.qr(torch.randn(width, len(sigma), generator=rng))[0]
    return left * torch.tensor(sigma) @ right.T + noise * torch.randn(out, width, generator=rng) / out**0.5


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (24, 500)])
@pytest.mark.parametrize("one_pass", [False, True])
def test_the_leading_pair_is_that_of_the_whole_matrix(shape: tuple[int, int], one_pass: bool) -> None:
    G = matrix(*shape, [3.0, 2.0, 0.5])
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    k = sketch_width(2, *shape)
    sketch = G @ normal(k, shape[1]).T
    if one_pass:
        psi = normal(shape[0], 2 * k + 1)
        factors = one_pass_factors(sketch, psi.T @ G, psi)
    else:
        basis = range_basis(sketch)
        factors = basis, basis.T @ G
    found = leading_triples(*factors, 2)
    assert found.sigma.tolist() == pytest.approx(S[:2].tolist(), rel=0.02)
    for i in range(2):
        assert abs(float(found.left[:, i] @ U[:, i])) > 0.98
        assert abs(float(found.right[i] @ V[i])) > 0.98


def test_what_lies_outside_of_the_directions_that_are_there() -> None:
    G = matrix(120, 80, [3.0, 2.0, 0.5])
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    basis = range_basis(G @ normal(18, 80).T)
    p, q = 2 * U[:, :1], torch.cat([V[:1], V[:1] + 0.1 * V[5:6]])  # not unit, not orthogonal
    found = leading_triples(*outside_of(basis, basis.T @ G, p, q), 1)
    assert float(found.sigma[0]) == pytest.approx(2.0, rel=0.02)
    assert abs(float(found.left[:, 0] @ U[:, 1])) > 0.99
    assert float((p.T @ found.left).abs().max()) < 1e-5
    assert float((q @ found.right.T).abs().max()) < 1e-5


def test_a_matrix_narrower_than_the_sketch_is_taken_whole() -> None:
    G = matrix(6, 9, [3.0, 1.0])
    k = sketch_width(4, 6, 9)
    assert k == 6
    basis = range_basis(G @ normal(k, 9).T)
    found = leading_triples(basis, basis.T @ G, 4)
    assert found.sigma.tolist() == pytest.approx(torch.linalg.svdvals(G)[:4].tolist(), rel=1e-4)


ALONE = """
import torch
from torch import distributed
from flexlora_ds.gradient.agreement import of_first_process, summed

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
values = {"a": torch.arange(3.0)}
print(summed(values)["a"].tolist(), of_first_process(values)["a"].tolist())
distributed.destroy_process_group()
"""


def test_one_process_that_torch_alone_has_joined_sums_nothing() -> None:
    """Other trainers open a group of one, and DeepSpeed knows of none. In a process of its own: others have a group."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[0.0, 1.0, 2.0] [0.0, 1.0, 2.0]", done.stderr
