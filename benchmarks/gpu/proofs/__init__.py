"""The guarantees that tests hold on a CPU, on the GPU there is: streams, NCCL, compiled kernels, half precision."""

from __future__ import annotations

from benchmarks.gpu.section import Conditions, Report


def run(conditions: Conditions, report: Report) -> None:
    """Kernels in this process, engines in others that start meanwhile; the cheapest and most important first."""
    from benchmarks.gpu.proofs import engines, kernels

    with engines.teams(conditions) as teams:
        kernels.run(conditions, report)
        engines.run(conditions, report, teams)


__all__ = ["run"]
