#!/bin/bash
# Train Janus-Pro-1B on two nodes with 8 GPUs each. Shortly before the time limit the run saves a
# checkpoint and the job is queued again; the next start resumes from that checkpoint.
#
#     sbatch examples/slurm.sh
#
# Submit from the repository, with the virtual environment active. The repository, the model and
# the prompt file must be on a file system that all nodes share. Change MODEL, PROMPTS and the
# #SBATCH lines for your cluster. docs/multi-gpu.md explains the choices.

#SBATCH --job-name=iris-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -u

MODEL=${MODEL:-path/to/Janus-Pro-1B}
PROMPTS=${PROMPTS:-prompts.jsonl}
RUN=${RUN:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}

# Seconds that torchrun waits for its workers after a SIGTERM before it kills them. The default of
# 30 can be too short to finish a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

resume=()
if [ -f "$RUN/config.yaml" ]; then
    resume=(--resume_from_checkpoint true)
fi

stopped=false
stop() {
    stopped=true
    scancel --signal=TERM "$SLURM_JOB_ID"   # reaches torchrun and its workers, not this script
}
trap stop USR1

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS_PER_NODE" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first_node:29500" \
    -m iris_fast.train --preset janus-pro-1b --model "$MODEL" --prompts "$PROMPTS" \
    --output_dir "$RUN" ${resume[@]+"${resume[@]}"} "$@" &
step=$!

# In the background, because bash runs a trap only after the command in the foreground has ended.
# The first `wait` returns when the signal arrives, the second when the checkpoint is written.
wait "$step"
code=$?
if $stopped; then
    wait "$step"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
