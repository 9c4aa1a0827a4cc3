"""The batch scripts: what they start on the nodes, and when they queue their job again.

SLURM is a stub that answers as the real one did (docs/slurm.md says what was tried there).
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.helpers.slurm_stub import Job, submit

REQUEUED = ["scancel --signal=USR1 31007", "scontrol requeue 31007"]


def stopped_by_shell(job: Job) -> tuple[int, str]:
    """Let the run begin, signal the batch shell alone, and wait for the end."""
    job.wait_until_ready()
    job.signal_shell(signal.SIGUSR1)
    return job.end()


@pytest.mark.parametrize(
    ("script", "program"), [("train.sbatch", ["launch/train.py"]), ("eval.sbatch", ["--module", "eval"])]
)
def test_every_node_gets_one_launcher(script: str, program: list[str], tmp_path: Path) -> None:
    words = ["--out", "a folder"]
    job = submit(tmp_path, script, *words, seconds=0, SLURM_GPUS_ON_NODE="8")
    assert job.end() == (0, "")
    for node in (0, 1):
        given = ["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "8"]
        meeting = ["--master_addr", "10.0.0.1", "--master_port", str(15000 + 31007 % 15000)]
        assert job.launcher(node) == ["-m", "torch.distributed.run", *given, *meeting, *program, *words]
    assert job.asked == []


@pytest.mark.parametrize("script", ["train.sbatch", "eval.sbatch"])
def test_a_run_that_fails_fails_the_job_and_is_not_queued_again(script: str, tmp_path: Path) -> None:
    job = submit(tmp_path, script, seconds=0, code=1)
    assert job.end() == (1, "")
    assert job.asked == []


def test_usr1_to_the_steps_stops_the_run_and_queues_nothing(tmp_path: Path) -> None:
    job = submit(tmp_path, "train.sbatch")
    job.wait_until_ready()
    job.signal_tasks(signal.SIGUSR1)
    assert job.end() == (0, "")
    assert job.asked == []


def test_usr1_to_the_batch_shell_stops_the_run_and_queues_it_again(tmp_path: Path) -> None:
    job = submit(tmp_path, "train.sbatch")
    assert stopped_by_shell(job) == (0, "")
    assert job.asked == REQUEUED


def test_a_run_whose_steps_cannot_be_signalled_goes_on(tmp_path: Path) -> None:
    """The signal's own job may be at its end, or SLURM's controller away; the run would die with the batch shell."""
    job = submit(tmp_path, "train.sbatch", seconds=1, unreachable=True)
    code, said = stopped_by_shell(job)
    assert (code, said) == (0, "the steps could not be signalled; the run goes on\n")
    assert job.asked == REQUEUED


def test_a_job_of_an_array_is_named_by_its_place(tmp_path: Path) -> None:
    """The number of an array's last job is the array's own: it would stop and queue again all of them."""
    array = {"SLURM_ARRAY_JOB_ID": "31007", "SLURM_ARRAY_TASK_ID": "4"}
    job = submit(tmp_path, "train.sbatch", **array)
    assert stopped_by_shell(job)[0] == 0
    assert job.asked == [f"{command}_4" for command in REQUEUED]


@pytest.mark.parametrize(
    ("restarts", "most", "again"), [("19", None, True), ("20", None, False), (None, "0", False)]
)
def test_restarts_are_bounded(restarts: str | None, most: str | None, again: bool, tmp_path: Path) -> None:
    """SLURM sets the count with the first restart."""
    given = {"SLURM_RESTART_COUNT": restarts, "MAX_REQUEUES": most}
    job = submit(tmp_path, "train.sbatch", **{k: v for k, v in given.items() if v is not None})
    code, said = stopped_by_shell(job)
    assert code == 0
    assert job.asked == (REQUEUED if again else REQUEUED[:1])
    assert said.startswith(f"not queued again after {restarts or 0} restarts") is not again


def test_a_refusal_to_queue_again_is_said(tmp_path: Path) -> None:
    code, said = stopped_by_shell(submit(tmp_path, "train.sbatch", refused=True))
    assert (code, said) == (0, "not queued again, SLURM refuses; submitted again, the run goes on\n")


@pytest.mark.parametrize(("preempted", "again"), [("2026-11-27T14:09:16", True), ("None", False)])
def test_a_run_that_ends_in_the_grace_time_of_a_preemption_is_queued_again(
    preempted: str, again: bool, tmp_path: Path
) -> None:
    """TERM, on which torchrun fails: SLURM takes the job for one that failed by itself."""
    job = submit(tmp_path, "train.sbatch", preempted=preempted)
    job.wait_until_ready()
    job.signal_tasks(signal.SIGTERM)
    code, _ = job.end()
    assert code == 1
    assert job.asked == (REQUEUED[1:] if again else [])
