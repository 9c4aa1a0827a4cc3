# Sourced by the sbatch scripts, in the job's first node: start torchrun once on every node of the job.
set -euo pipefail

if [[ ! -x .venv/bin/python ]]; then
    echo "error: no .venv here ($PWD); submit from the repository's root, after make setup" >&2
    exit 2
fi
# Programs that the processes start by name (ninja) come from the environment too.
export PATH="$PWD/.venv/bin:$PATH"

# The address that SLURM itself uses: a node's name need not resolve on the others.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
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
