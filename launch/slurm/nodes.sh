# Sourced by the sbatch scripts, in the job's first node: start torchrun once on every node of the job.
set -euo pipefail

if [[ ! -x .venv/bin/python ]]; then
    echo "error: no .venv here ($PWD); submit from the repository's root, after make setup" >&2
    exit 2
fi
# Programs that the processes start by name (ninja) come from the environment too.
export PATH="$PWD/.venv/bin:$PATH"

# The address that SLURM itself uses: a node's name need not resolve on the others.
# And sed, which reads to the end: `head` would end a scontrol that still writes, and with it this job.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
# Below the ports that Linux hands out by itself, and another one for every job that shares a node.
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
export MASTER_ADDR MASTER_PORT PROCESSES_PER_NODE

# SLURM sends a signal to every process of a step, torchrun included, which would end its processes on it: it
# ignores USR1 (as the shell that starts it does), and the training processes, which install a handler, act on it.
run_on_all_nodes() {
    srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec python -m torch.distributed.run \
        --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" --nproc_per_node "$PROCESSES_PER_NODE" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"' bash "$@"
}

# Run, and queue the job again where it was stopped so that another one may follow.
run_and_requeue() {
    local job=$SLURM_JOB_ID asked="" code=0
    if [[ ${SLURM_ARRAY_JOB_ID:-} ]]; then  # the number of an array's last job means the whole array
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    # USR1 to this shell alone (`sbatch --signal=B:USR1@300`): on to the steps.
    trap 'trap "" USR1; asked=yes; scancel --signal=USR1 "$job" || echo "the steps could not be signalled; the run goes on" >&2' USR1
    run_on_all_nodes "$@" &
    wait "$!" || code=$?
    if [[ $asked ]]; then  # the signal broke off the first wait
        code=0
        wait "$!" || code=$?
    fi
    if { [[ $asked ]] && ((code == 0)); } || { ((code != 0)) && preempted "$job"; }; then
        queue_again "$job"
    fi
    return "$code"
}

# Whether the job is in the grace time before a preemption: SLURM queues no job again that ends in it by itself.
preempted() {
    [[ $(scontrol show job "$1") == *PreemptTime=[0-9]* ]]
}

# The bound is for a run that never gets to its first step in the time that a job has: it would begin anew for ever.
queue_again() {
    local restarts=${SLURM_RESTART_COUNT:-0}
    if ((restarts >= ${MAX_REQUEUES:-20})); then
        echo "not queued again after $restarts restarts (MAX_REQUEUES); submitted again, the run goes on" >&2
    elif ! scontrol requeue "$1"; then
        echo "not queued again, SLURM refuses; submitted again, the run goes on" >&2
    fi
}
