"""Proofs of what is taken from the gradient: the start, new directions, and the prices of the market."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.proofs.engines import relative
from benchmarks.gpu.proofs.proof import Verdict
from benchmarks.gpu.proofs.teams import Teams
from benchmarks.gpu.section import Conditions
from tests.helpers import gradient_worker

LEADS = 1.5
"""A first singular value of so many times the second names its direction; where they are near, any mixture is right."""


def start(stage: int, conditions: Conditions, teams: Teams) -> Verdict:
    """P and Q of a start, beside the singular pairs of the whole gradient by plain torch on a CPU."""
    (found,) = teams["changes"].run(gradient_worker.started, {"stage": stage})
    off, least, led = 0.0, 1.0, 0
    for name, gradient in teams.whole_gradients.items():
        left, sigma, right = torch.linalg.svd(gradient, full_matrices=False)
        if sigma[0] < LEADS * sigma[1]:
            continue
        led += 1
        p, q = (torch.tensor(found[role][name], dtype=torch.float64) for role in ("P", "Q"))
        off = max(off, abs(found["sigma"][name][0] / float(sigma[0]) - 1))
        least = min(least, abs(float(p[:, 0] @ left[:, 0])), abs(float(q[0] @ right[0])))
    same = found["before"] == found["after"]
    detail = f"{led} leading pairs: σ {off:.1e} apart, bound 2e-02, cosines from {least:.3f}, bound 0.98; "
    detail += f"the loss before and after is {'bit-equal' if same else 'another'}"
    return same and led >= 3 and off < 0.02 and least > 0.98 and not found["gaussian"], detail


def directions(conditions: Conditions, teams: Teams) -> Verdict:
    """New directions at stage 0 beside the pairs of the whole gradient; other stages beside stage 0."""
    first, *others = _at_stages(gradient_worker.grown, {"compare": True}, conditions, teams)
    (change,) = first["changes"]
    leading = [c for c in change["compared"] if c[0] >= LEADS * c[1]]
    least = min((min(c[2:]) for c in leading), default=0.0)
    changes = [found["changes"][0] for found in (first, *others)]
    moved = max(abs(c["after"] / c["before"] - 1) for c in changes)
    overlap = max(c["overlap"] for c in changes)
    apart = max((relative(found["losses"], first["losses"]) for found in others), default=0.0)
    same = all(c["expanded"] == change["expanded"] for c in changes)
    detail = f"{len(leading)} leading pairs, cosines from {least:.3f}, bound 0.98; stages {apart:.1e} apart, bound "
    detail += (
        f"1e-04, {'the same' if same else 'other'} matrices; the loss moves by {moved:.1e}, bound 1e-06; "
    )
    detail += f"products with older directions up to {overlap:.0e}, bound 1e-05"
    holds = len(leading) >= 3 and least > 0.98 and same and apart < 1e-4
    return holds and moved < 1e-6 and overlap < 1e-5, detail


def prices(conditions: Conditions, teams: Teams) -> Verdict:
    """∂L/∂λ of every living direction from a step's sketch, beside autograd's; other stages beside stage 0."""
    first, *others = _at_stages(gradient_worker.priced, {}, conditions, teams)
    off = _largest_gap(first["found"], first["exact"])
    apart = max((_largest_gap(found["found"], first["found"]) for found in others), default=0.0)
    kept = all(found["total"] == first["total"] for found in others)
    paid = all(
        change["market"]["expected_gain"] > change["market"]["expected_loss"] or not change["expanded"]
        for found in (first, *others)
        for change in found["changes"]
    )
    detail = f"{len(first['exact'])} matrices, {off:.1e} from autograd, stages {apart:.1e} apart, bound 1e-02; the "
    detail += f"budget is {'kept' if kept else 'broken'}, what was traded {'paid' if paid else 'did not pay'}"
    return len(first["exact"]) > 4 and off < 1e-2 and apart < 1e-2 and kept and paid, detail


def _at_stages(
    function: Any, more: dict[str, Any], conditions: Conditions, teams: Teams
) -> list[dict[str, Any]]:
    """What `function` found at stage 0, with `more` in its case, then at stages 2 and 3."""
    first = teams["changes"].run(function, {"stage": 0, **more})
    others = [teams["changes"].run(function, {"stage": s}) for s in ((3,) if conditions.tiny else (2, 3))]
    return [found for (found,) in (first, *others)]


def _largest_gap(found: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    """By norm, the largest of the matrices; of a matrix whose values are tiny beside the others', by theirs."""
    values = {name: torch.tensor(row, dtype=torch.float64) for name, row in expected.items()}
    floor = 1e-3 * max((float(value.norm()) for value in values.values()), default=0.0)
    return max(
        float((torch.tensor(found[name], dtype=torch.float64) - value).norm())
        / max(float(value.norm()), floor)
        for name, value in values.items()
    )
