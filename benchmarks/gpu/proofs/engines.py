"""Proofs under DeepSpeed: every stage and precision against plain torch on a CPU, changes, memory, resuming."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.gpu.proofs import resuming, worker
from benchmarks.gpu.section import Conditions, Report
from tests.helpers import rank_worker, tiny, twin
from tests.helpers.compiled_run import run_beside_plain
from tests.helpers.processes import Processes, on_gpus

DUE = {15: 4, 25: 4, 35: 3, 45: 2}
RANKS = "tests/distributed/test_rank_changes.py::"
BOUNDS = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Of a loss from that of plain torch in fp32: in half precision the base is rounded too, and ranks may part."""
STAGES = (0, 2, 3)
LEFT_OUT = (
    "stage 0",
    "stage 2: every",
    "stage 3: an empty",
    "stage 3 in bf16",
    "stage 3: two",
    "stage 3: offload",
    "compiled layers",
)
"""Beginnings of the proofs that the tiny form leaves out: their code runs at another stage."""


@dataclass
class Teams:
    """Processes that start while something else is proven, and what plain torch computes meanwhile."""

    one: Processes
    two: Processes
    reference: Future[dict[str, Any]]
    one_ready: Future[list[Any]]
    two_ready: Future[list[Any]] | None
    steps: int
    seen: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    """Trajectories by stage and precision."""


@contextmanager
def teams(conditions: Conditions) -> Iterator[Teams]:
    """Start the processes; on a card all at once, on a CPU the pair when it is needed."""
    gpu = conditions.device.type == "cuda"
    steps = 16 if conditions.tiny else 40
    plain_torch = _plain_torch(steps)
    with tempfile.TemporaryDirectory(prefix="flexlora-") as cache, ThreadPoolExecutor(3) as threads:
        # Their starting threads must outlive the processes, which end with them.
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLEXLORA_CACHE": cache}
        environment |= on_gpus() if gpu else {}
        with (
            Processes(1, timeout=90, env=environment) as one,
            Processes(2, timeout=90, env=environment) as two,
        ):
            yield Teams(
                one,
                two,
                threads.submit(plain_torch),
                threads.submit(one.run, worker.ready),
                threads.submit(two.run, worker.ready_on_one_card) if gpu else None,
                steps,
            )


def _plain_torch(steps: int) -> Callable[[], dict[str, Any]]:
    """What to call in a thread; the model is made here, for it draws from the process's one generator."""
    config = rank_worker.configuration()
    model = tiny.adapted_llama(config)
    return partial(twin.train, model, config, rank_worker.batches(steps), DUE, 5e-3, 200, 0.05)


def run(conditions: Conditions, report: Report, teams: Teams) -> None:
    """All of them, as far as the time goes."""
    proofs: list[tuple[str, float, Any]] = [
        *((f"stage {s} in {d} trains as plain torch", 2.0, partial(against_plain_torch, s, d))
          for d in ("fp32", "bf16", "fp16") for s in STAGES),
        *((f"stage {s}: an empty plan changes no bit", 3.0, partial(empty_plan, s)) for s in STAGES),
        *((f"stage {s}: every state of every survivor is exact", 2.0, partial(survivors, s)) for s in STAGES),
        *((f"stage {s}: growth leaves the function as it is", 2.0, partial(growth, s)) for s in (0, 3)),
        ("stage 3: a change while fetches are in flight", 12.0, busy),
        *((f"stage {s}: changes leave memory flat", 10.0, partial(memory, s)) for s in (2, 3)),
        *((f"stage {s}: offload to the host changes rounding only", 4.0, partial(offload, s)) for s in (2, 3)),
        ("compiled layers compute what plain ones do, and rank changes compile nothing", 40.0, compiled),
        ("Liger's kernels compute what the base does", 6.0, liger),
        ("a resumed run is the run, bit for bit", 20.0, resuming.resumed),
        *((f"stage {s}: two processes on one card over gloo are one", 8.0, partial(pair, s)) for s in (2, 3)),
    ]  # fmt: skip
    why = _obstacle(teams.one_ready)
    for name, seconds, prove in proofs:
        if not conditions.wants(name):
            continue
        if why:
            report.proof(name, False, why)
            continue
        if conditions.tiny and name.startswith(LEFT_OUT):
            report.absent(name, "left out of the tiny form")
            continue
        if conditions.left < seconds:
            report.absent(name, f"no time left: {conditions.left:.0f} s, it may take {seconds:.0f}")
            continue
        with report.attempt(name, proof=True):
            prove(name, conditions, report, teams)


def _obstacle(start: Future[list[Any]]) -> str:
    """Why the process that all engines need has not started; nothing where it has."""
    try:
        start.result()
    except Exception as error:  # said once for each proof, instead of another start for each
        print(error, flush=True)
        return f"no process to prove it in: {(str(error).strip().splitlines() or ['no text'])[-1]}"
    return ""


def against_plain_torch(
    stage: int, dtype: str, name: str, conditions: Conditions, report: Report, teams: Teams
) -> None:
    if dtype == "fp16" and not teams.one.run(worker.computes_fp16)[0]:
        report.absent(name, "DeepSpeed computes no fp16 on this device")
        return
    steps = teams.steps if dtype == "fp32" else min(30, teams.steps)
    (found,) = teams.one.run(worker.trajectory, {"stage": stage, "dtype": dtype, "steps": steps})
    expected = teams.reference.result()
    teams.seen[stage, dtype] = found
    apart = relative(found["losses"], expected["losses"][:steps])
    same = found["ranks"] == expected["ranks"][: len(found["ranks"])]
    detail = f"losses {apart:.1e} apart in {steps} steps, {len(found['ranks'])} changes, bound {BOUNDS[dtype]:.0e}; "
    detail += f"ranks {'the same' if same else 'part'}"
    holds = apart < BOUNDS[dtype] and (same or dtype != "fp32")
    first = teams.seen.get((STAGES[0], dtype))
    if dtype != "fp32" and stage != STAGES[0] and first:
        between = relative(found["losses"], first["losses"])
        holds &= between < BOUNDS[dtype]
        detail += f"; {between:.1e} from stage 0"
    report.proof(name, holds, detail, test=RANKS + "test_ranks_and_losses_are_those_of_plain_torch")


def relative(losses: list[float], others: list[float]) -> float:
    """The largest relative difference; infinite where there is a NaN."""
    found = [abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True)]
    return max(found) if all(value == value for value in found) else float("inf")


def empty_plan(stage: int, name: str, conditions: Conditions, report: Report, teams: Teams) -> None:
    controls = ["without moments", "without age", "without masters"]
    variants = ["none", "rebuilt", *(controls[:1] if conditions.tiny else controls)]
    case = {"stage": stage, "dtype": "bf16", "variants": variants}
    (losses,) = teams.one.run(rank_worker.empty_plans, case)
    same = losses["rebuilt"] == losses["none"]
    blind = [control for control in variants[2:] if losses[control] == losses["none"]]
    detail = f"20 losses in bf16 {'are' if same else 'are not'} bit-equal; {len(variants) - 2} controls"
    detail += f", of which {', '.join(blind)} changed nothing" if blind else " differ"
    report.proof(name, same and not blind, detail, test=RANKS + "test_an_empty_plan_changes_nothing")


def survivors(stage: int, name: str, conditions: Conditions, report: Report, teams: Teams) -> None:
    found = {
        dtype: teams.one.run(rank_worker.carried_state, {"stage": stage, "dtype": dtype})[0]
        for dtype in (("bf16",) if conditions.tiny else ("fp32", "bf16"))
    }
    odd = {d: {k: v for k, v in worst.items() if v != 0} for d, worst in found.items()}
    holds = not any(odd.values())
    detail = f"{', '.join(found)}: {'no element differs' if holds else odd}"
    report.proof(name, holds, detail, test=RANKS + "test_every_state_of_every_survivor_is_carried_exactly")


def growth(stage: int, name: str, conditions: Conditions, report: Report, teams: Teams) -> None:
    case = {"stage": stage, "options": {"direction": "expand"}}
    (changes,) = teams.one.run(rank_worker.losses_around, case)
    apart = [abs(c["loss_after"] - c["loss_before"]) / c["loss_before"] for c in changes if c["expanded"]]
    equal = sum(value == 0 for value in apart)
    detail = f"{len(apart)} changes, {equal} bit-equal, losses at most {max(apart, default=1.0):.1e} apart, bound 1e-6"
    holds = len(apart) == 4 and max(apart) < 1e-6  # a card takes another kernel for another rank
    report.proof(name, holds, detail, test=RANKS + "test_expansion_leaves_the_function_as_it_is")


def memory(stage: int, name: str, conditions: Conditions, report: Report, teams: Teams) -> None:
    at = [2, 4, 6] if conditions.tiny else [10, 50, 100]
    case = {"stage": stage, "changes": at[-1], "at": at}
    (found,) = teams.one.run(worker.memory_over_changes, case)
    if not found["memory"]:
        report.absent(name, f"needs a GPU; {at[-1]} changes were made and moved {found['moved']} directions")
        return
    (_, *first), (_, *middle), (_, *last) = found["memory"]
    grown = last[0] - first[0]
    reserved = last[1] - middle[1]
    layout = found["one layout"]
    rows = "; ".join(f"change {n}: {a / 2**20:.2f} and {r / 2**20:.0f} MiB" for n, a, r in found["memory"])
    detail = f"allocated and reserved at {rows}; one layout is {layout / 2**20:.2f} MiB"
    holds = grown < layout and reserved <= 2 * 2**20 and found["moved"] >= at[-1]
    report.proof(name, holds, detail, test=RANKS + "test_200_changes_grow_no_memory")


def busy(name: str, conditions: Conditions, report: Report, teams: Teams) -> None:
    wide = {"hidden": 64, "layers": 4, "ahead": 5000}
    if conditions.device.type == "cuda" and not conditions.tiny:
        wide = {"hidden": 4096, "layers": 4, "ahead": 2 * 10**7}
    (found,) = teams.one.run(worker.busy_changes, {**wide, "steps": 10})
    one, other = found["waiting"], found["busy"]
    same = one["losses"] == other["losses"] and one["ranks"] == other["ranks"]
    fetches, working = other["in flight"], sum(other["at work"])
    detail = (
        f"losses {'are' if same else 'are not'} bit-equal to a run that waits first; parameters in flight at "
    )
    detail += f"each change: {fetches}; the card was at work at {working} of {len(fetches)}"
    if conditions.device.type != "cuda":
        report.absent(name, f"needs a GPU; {detail}")
        return
    report.proof(
        name, same and any(fetches), detail, test=RANKS + "test_a_change_at_stage_3_never_gathers_the_base"
    )


def offload(stage: int, name: str, conditions: Conditions, report: Report, teams: Teams) -> None:
    host = {"device": "cpu", "pin_memory": conditions.device.type == "cuda"}
    case = {"stage": stage, "steps": teams.steps, "zero": {"offload_optimizer": host}}
    (found,) = teams.one.run(worker.trajectory, case)
    kept = teams.seen[stage, "fp32"]
    apart, same = relative(found["losses"], kept["losses"]), found["ranks"] == kept["ranks"]
    detail = f"losses {apart:.1e} apart, bound 1e-4; ranks {'the same' if same else 'part'}"
    test = "tests/distributed/test_resume.py::test_another_stage_and_number_of_processes_continue_within_rounding"
    report.proof(name, apart < 1e-4 and same, detail, test=test)


def compiled(name: str, conditions: Conditions, report: Report, teams: Teams) -> None:
    (found,) = teams.one.run(run_beside_plain, {"stage": 2, "backend": "inductor"}, timeout=90)
    plain, blocks = found["plain"], found["compiled"]
    apart, same = relative(blocks["losses"], plain["losses"]), blocks["ranks"] == plain["ranks"]
    graphs = blocks["graphs"]
    detail = f"losses {apart:.1e} apart with dropout, bound 1e-4; ranks {'the same' if same else 'part'}; "
    detail += f"{graphs[0]} graph after the first step, {graphs[-1]} after {blocks['changes']} changes"
    holds = apart < 1e-4 and same and graphs[0] == graphs[-1] == 1 and not found["breaks"]
    test = "tests/distributed/test_compiled_blocks.py::"
    report.proof(
        name, holds, detail, test=test + "test_every_layer_runs_one_graph_that_no_rank_change_compiles_again"
    )


def liger(name: str, conditions: Conditions, report: Report, teams: Teams) -> None:
    if conditions.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        report.absent(name, "needs a GPU and the package liger-kernel")
        return
    ((plain, fused),) = teams.one.run(worker.with_and_without_liger)
    apart = relative(fused, plain)
    test = "tests/distributed/test_gpu.py::test_ligers_kernels_compute_what_the_base_does"
    report.proof(name, apart < 1e-4, f"losses {apart:.1e} apart, bound 1e-4", test=test)


def pair(stage: int, name: str, conditions: Conditions, report: Report, teams: Teams) -> None:
    steps = min(teams.steps, 30)
    try:
        if teams.two_ready is None:
            teams.two.run(worker.ready_on_one_card)
        else:
            teams.two_ready.result()
        teams.two_ready = None
        results = teams.two.run(worker.trajectory, {"stage": stage, "steps": steps}, timeout=40)
    except Exception as error:  # a collective that gloo lacks, most likely
        if stage != 3:
            raise
        lines = [line for line in str(error).splitlines() if "Error" in line] or [str(error)[:200]]
        report.absent(name, f"gloo does not serve ZeRO-3 on a card: {lines[0].strip()}")
        return
    alone = teams.seen[stage, "fp32"]
    apart = max(relative(result["losses"], alone["losses"][:steps]) for result in results)
    same = all(result["ranks"] == alone["ranks"][: len(result["ranks"])] for result in results)
    same &= results[0]["checksum"] == results[1]["checksum"]
    detail = f"losses {apart:.1e} apart in {steps} steps, bound 1e-4; ranks and masters {'agree' if same else 'part'}"
    test = RANKS + "test_ranks_and_losses_are_those_of_plain_torch"
    report.proof(name, apart < 1e-4 and same, detail, test=test)
