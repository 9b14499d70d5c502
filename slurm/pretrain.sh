#!/bin/bash
# Pretrain under Slurm, one task per rank; the same file for one node or five hundred. The command line of sbatch
# overrides every line below, and `tubelet submit` fills them in:
#
#   sbatch slurm/pretrain.sh                     the demo config: two CPU ranks on one node (after `make demo`)
#   sbatch --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=24:00:00 \
#       slurm/pretrain.sh configs/vit_large_k400.yaml data.shards=s3://BUCKET/k400
#
# Submit it from the project folder. Killed, pre-empted, out of time or off a lost node, the job goes back into the
# queue and on from its newest checkpoint; it ends when the run is finished (0) or a person is needed (93).
# To stop it for good: touch runs/NAME/STOP
# A line of your own before the ranks (module load …), a container, a network interface: launch.* in the config.
#
#SBATCH --job-name=tubelet
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

trap : TERM # of the time limit: the ranks save, and there are KillWait seconds left to get back into the queue
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the project folder}" || exit 93
export PATH="$PWD/.venv/bin:$PATH"
export PYTHONPATH="${TUBELET_CODE:-$PWD}${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 # the code as it was submitted
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"                                      # srun forgets it from 22.05 on

before=$(python -m launch.slurm before "$@") || exit
mapfile -t step <<<"$before" # the newest attempt, the prologue, words of srun
eval "${step[1]}" || {
  echo "tubelet: launch.prologue failed: try it in a shell on $(hostname), then submit again" >&2
  exit 93
}
srun --kill-on-bad-exit=1 --wait=300 "${step[@]:2}" python -m launch.node "$@"
exec python -m launch.slurm after "${step[0]}" "$?" "$@"
