"""Proofs that one way to run is another: offload, compiled layers, Liger's kernels, two processes on one card."""

from __future__ import annotations

import importlib.util

from benchmarks.gpu.proofs import worker
from benchmarks.gpu.proofs.engines import relative
from benchmarks.gpu.proofs.proof import Verdict
from benchmarks.gpu.proofs.teams import Teams
from benchmarks.gpu.section import Conditions, NotRunError
from tests.helpers.compiled_run import run_beside_plain
from tests.helpers.processes import ProcessError
from tests.helpers.replayed_run import WAYS, run_every_way

BOUND = 1e-4
"""Of losses in fp32, relative: another order of sums, step after step."""
BF16 = 3e-2
"""The same in bf16."""


def offload(stage: int, conditions: Conditions, teams: Teams) -> Verdict:
    """The optimizer in the host's memory, beside the same run on the device."""
    host = {"device": "cpu", "pin_memory": conditions.device.type == "cuda"}
    case = {"stage": stage, "steps": teams.steps, "zero": {"offload_optimizer": host}}
    (found,) = teams["memory"].run(worker.trajectory, case)
    kept = teams.trajectory(stage)
    apart, same = relative(found["losses"], kept["losses"]), found["ranks"] == kept["ranks"]
    detail = f"losses {apart:.1e} apart in {teams.steps} steps, bound {BOUND:.0e}; "
    return apart < BOUND and same, detail + f"ranks {'the same' if same else 'part'}"


def compiled(conditions: Conditions, teams: Teams) -> Verdict:
    """Whole layers compiled, with dropout and a change after every step; one graph from the first step on."""
    (found,) = teams["programs"].run(run_beside_plain, {"stage": 2, "backend": "inductor"}, timeout=90)
    plain, blocks = found["plain"], found["compiled"]
    apart, same = relative(blocks["losses"], plain["losses"]), blocks["ranks"] == plain["ranks"]
    graphs = blocks["graphs"]
    detail = (
        f"losses {apart:.1e} apart with dropout, bound {BOUND:.0e}; ranks {'the same' if same else 'part'}; "
    )
    detail += f"{graphs[0]} graph after the first step, {graphs[-1]} after {blocks['changes']} changes"
    return apart < BOUND and same and graphs[0] == graphs[-1] == 1 and not found["breaks"], detail


def replayed(conditions: Conditions, teams: Teams) -> Verdict:
    """Packed runs whose compiled layers run one by one, as one node, and replayed; deterministic algorithms on."""
    case = {"stage": 2, "backend": "inductor", "shape": {"hidden": 128}, "deterministic": True}
    if conditions.device.type != "cuda":
        case["backend"] = "aot_eager"
    (found,) = teams["memory"].run(run_every_way, case, timeout=120)
    single, node, replay = (found[way] for way in WAYS)
    apart = max(relative(way["losses"], single["losses"]) for way in (node, replay))
    equal = all(replay[name] == node[name] for name in ("losses", "norms", "ranks"))
    share = (
        f"{replay['replays'][-1]} of {2 * len(replay['losses'])} passes replayed, {replay['changes']} changes"
    )
    detail = f"{share}; losses, norms and ranks {'are' if equal else 'are not'} bit-equal to those computed; "
    detail += f"{apart:.1e} apart from layers one by one, bound {BF16:.0e}"
    return equal and replay["replays"][-1] >= 8 and apart < BF16, detail


def liger(conditions: Conditions, teams: Teams) -> Verdict:
    """Losses with Liger's kernels and without."""
    if conditions.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        raise NotRunError("needs a GPU and the package liger-kernel")
    ((plain, fused),) = teams["programs"].run(worker.with_and_without_liger)
    apart = relative(fused, plain)
    return apart < BOUND, f"losses {apart:.1e} apart, bound {BOUND:.0e}"


def pair(stage: int, conditions: Conditions, teams: Teams) -> Verdict:
    """Two processes that share the card, beside one."""
    try:
        results = teams["pair"].run(
            worker.trajectory, {"stage": stage, "steps": min(teams.steps, 30)}, timeout=40
        )
    except ProcessError as error:
        lacking = _lacking(str(error))
        if lacking is None:
            raise
        raise NotRunError(f"gloo does not serve ZeRO-{stage} on a card: {lacking}") from None
    alone, steps = teams.trajectory(stage), len(results[0]["losses"])
    apart = max(relative(result["losses"], alone["losses"][:steps]) for result in results)
    same = all(result["ranks"] == alone["ranks"][: len(result["ranks"])] for result in results)
    same &= results[0]["checksum"] == results[1]["checksum"]
    detail = f"losses {apart:.1e} apart in {steps} steps, bound {BOUND:.0e}; "
    return apart < BOUND and same, detail + f"ranks and masters {'agree' if same else 'part'}"


def _lacking(text: str) -> str | None:
    """The line of an error in which gloo says what it has not; None for any other error."""
    for line in text.splitlines():
        if "Error" in line and "gloo" in line.lower():
            return line.strip()
    return None
