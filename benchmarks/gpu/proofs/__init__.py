"""The guarantees that tests hold on a CPU, on the GPU there is: streams, NCCL, compiled kernels, half precision."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from benchmarks.gpu.section import Conditions, NotRunError, Report

if TYPE_CHECKING:
    from benchmarks.gpu.proofs.proof import Proof
    from benchmarks.gpu.proofs.teams import Teams


def run(conditions: Conditions, report: Report) -> None:
    """All that were asked for, the lanes side by side on a card and one after another on a CPU; then their number."""
    from benchmarks.gpu.proofs.listed import proofs
    from benchmarks.gpu.proofs.teams import teams

    asked = [proof for proof in proofs() if conditions.wants(proof.name)]
    by_lane: dict[str, list[Proof]] = {}
    for proof in asked:
        by_lane.setdefault(proof.lane, []).append(proof)
    counts: Counter[str] = Counter()
    with (
        teams(conditions) as started,
        ThreadPoolExecutor(len(by_lane) if conditions.device.type == "cuda" else 1) as threads,
    ):
        done = [threads.submit(_run_lane, lane, conditions, report, started) for lane in by_lane.values()]
        for lane in done:
            counts += lane.result()
    said = ", ".join(f"{counts[what]} {what}" for what in ("hold", "fail", "not run"))
    report.figure("proofs", f"{said}, of {len(asked)}")


def _run_lane(lane: list[Proof], conditions: Conditions, report: Report, teams: Teams) -> Counter[str]:
    """Prove one after another; how many hold, fail and were not run."""
    return Counter(_outcome(proof, conditions, report, teams) for proof in lane)


def _outcome(proof: Proof, conditions: Conditions, report: Report, teams: Teams) -> str:
    """Prove and report; a word for what came of it."""
    outcome = "fail"
    with report.attempt(proof.name, proof=True):
        try:
            _require_room(proof, conditions)
            holds, detail = proof.prove(conditions, teams)
        except NotRunError as why:
            report.absent(proof.name, str(why), proof=True)
            return "not run"
        report.proof(proof.name, holds, detail, test=proof.test)
        outcome = "hold" if holds else "fail"
    return outcome


def _require_room(proof: Proof, conditions: Conditions) -> None:
    """Raise NotRunError where the tiny form leaves a proof out, or its time has run out."""
    if conditions.tiny and not proof.tiny:
        raise NotRunError("left out of the tiny form: its code runs there at another stage, or in a test")
    if conditions.left < proof.seconds:
        raise NotRunError(f"no time left: {conditions.left:.0f} s, it may take {proof.seconds:.0f}")


__all__ = ["run"]
