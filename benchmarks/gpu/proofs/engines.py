"""Proofs of rank changes under DeepSpeed: every stage and precision, states, memory, fetches in flight."""

from __future__ import annotations

from benchmarks.gpu.proofs import worker
from benchmarks.gpu.proofs.proof import Verdict
from benchmarks.gpu.proofs.teams import Teams
from benchmarks.gpu.section import Conditions, NotRunError
from tests.helpers import rank_worker

BOUNDS = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Of a loss from that of plain torch in fp32: in half precision the base is rounded too, and ranks may part."""
STAGES = (0, 2, 3)


def against_plain_torch(stage: int, dtype: str, conditions: Conditions, teams: Teams) -> Verdict:
    """Losses and ranks beside those of plain torch on a CPU, in half precision also beside stage 0's."""
    if dtype == "fp16" and not teams["changes"].run(worker.computes_fp16)[0]:
        raise NotRunError("DeepSpeed computes no fp16 on this device")
    found, expected = teams.trajectory(stage, dtype), teams.plain_torch.result()
    steps = len(found["losses"])
    apart = relative(found["losses"], expected["losses"][:steps])
    same = found["ranks"] == expected["ranks"][: len(found["ranks"])]
    detail = f"losses {apart:.1e} apart in {steps} steps, {len(found['ranks'])} changes, bound {BOUNDS[dtype]:.0e}; "
    detail += f"ranks {'the same' if same else 'part'}"
    holds = apart < BOUNDS[dtype] and (same or dtype != "fp32")
    if dtype != "fp32" and stage != STAGES[0] and not conditions.tiny:
        between = relative(found["losses"], teams.trajectory(STAGES[0], dtype)["losses"])
        holds &= between < BOUNDS[dtype]
        detail += f"; {between:.1e} from stage 0"
    return holds, detail


def relative(losses: list[float], others: list[float]) -> float:
    """The largest relative difference; infinite where there is a NaN."""
    found = [abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True)]
    return max(found) if all(value == value for value in found) else float("inf")


def together(conditions: Conditions, teams: Teams) -> Verdict:
    """Losses, ranks and masters of runs that copy gradients together, beside DeepSpeed's own, in several buckets."""
    found = {}
    for overlapped in (False, True):
        zero = {"reduce_bucket_size": 300, "overlap_comm": overlapped}
        case = {"stage": 2, "dtype": "bf16", "steps": 20, "zero": zero}
        (theirs,) = teams["changes"].run(worker.trajectory, case)
        (ours,) = teams["changes"].run(worker.trajectory, case | {"spare": True})
        assert theirs["ranks"], "ranks change on the way"
        found["overlapped" if overlapped else "one stream"] = ours == theirs
    parted = [name for name, same in found.items() if not same]
    return not parted, f"20 steps, a change, stage 2: {'bit-equal' if not parted else f'not {parted}'}"


def empty_plan(stage: int, conditions: Conditions, teams: Teams) -> Verdict:
    """20 losses after a rebuild that changes nothing; controls that lose something must show."""
    controls = ["without moments", "without age", "without masters"]
    variants = ["none", "rebuilt", *(controls[:1] if conditions.tiny else controls)]
    case = {"stage": stage, "dtype": "bf16", "variants": variants}
    (losses,) = teams["changes"].run(rank_worker.empty_plans, case)
    same = losses["rebuilt"] == losses["none"]
    blind = [control for control in variants[2:] if losses[control] == losses["none"]]
    detail = f"20 losses in bf16 {'are' if same else 'are not'} bit-equal; {len(variants) - 2} controls"
    return same and not blind, detail + (
        f", of which {', '.join(blind)} changed nothing" if blind else " differ"
    )


def survivors(stage: int, conditions: Conditions, teams: Teams) -> Verdict:
    """Every element of every state of what survives a change."""
    found = {
        dtype: teams["changes"].run(rank_worker.carried_state, {"stage": stage, "dtype": dtype})[0]
        for dtype in (("bf16",) if conditions.tiny else ("fp32", "bf16"))
    }
    odd = {d: {k: v for k, v in worst.items() if v != 0} for d, worst in found.items()}
    holds = not any(odd.values())
    return holds, f"{', '.join(found)}: {'no element differs' if holds else odd}"


def growth(stage: int, conditions: Conditions, teams: Teams) -> Verdict:
    """The validation loss on both sides of changes that only grow."""
    case = {"stage": stage, "options": {"direction": "expand"}}
    (changes,) = teams["changes"].run(rank_worker.losses_around, case)
    apart = [abs(c["loss_after"] - c["loss_before"]) / c["loss_before"] for c in changes if c["expanded"]]
    equal = sum(value == 0 for value in apart)
    detail = f"{len(apart)} changes, {equal} bit-equal, losses at most {max(apart, default=1.0):.1e} apart, bound 1e-6"
    return len(apart) == 4 and max(apart) < 1e-6, detail  # a card takes another kernel for another rank


def memory(stage: int, conditions: Conditions, teams: Teams) -> Verdict:
    """Allocated memory from change 10 on, reserved memory from change 50 on."""
    at = [2, 4, 6] if conditions.tiny else [10, 50, 100]
    case = {"stage": stage, "changes": at[-1], "at": at}
    (found,) = teams["memory"].run(worker.memory_over_changes, case)
    if not found["memory"]:
        raise NotRunError(f"needs a GPU; {at[-1]} changes were made and moved {found['moved']} directions")
    (_, *first), (_, *middle), (_, *last) = found["memory"]
    layout = found["one layout"]
    rows = "; ".join(f"change {n}: {a / 2**20:.2f} and {r / 2**20:.0f} MiB" for n, a, r in found["memory"])
    detail = f"allocated and reserved at {rows}; one layout is {layout / 2**20:.2f} MiB"
    flat = last[0] - first[0] < layout and last[1] - middle[1] <= 2 * 2**20
    return flat and found["moved"] >= at[-1], detail


def busy(conditions: Conditions, teams: Teams) -> Verdict:
    """Changes while ZeRO-3 fetches from the host, beside a run that waits for the fetches first."""
    wide = {"hidden": 64, "layers": 4, "ahead": 5000}
    if conditions.device.type == "cuda" and not conditions.tiny:
        wide = {"hidden": 4096, "layers": 4, "ahead": 2 * 10**7}
    (found,) = teams["memory"].run(worker.busy_changes, {**wide, "steps": 10})
    one, other = found["waiting"], found["busy"]
    same = one["losses"] == other["losses"] and one["ranks"] == other["ranks"]
    fetches, working = other["in flight"], sum(other["at work"])
    detail = (
        f"losses {'are' if same else 'are not'} bit-equal to a run that waits first; parameters in flight at "
    )
    detail += f"each change: {fetches}; the card was at work at {working} of {len(fetches)}"
    if conditions.device.type != "cuda":
        raise NotRunError(f"needs a GPU; {detail}")
    return same and any(fetches), detail
