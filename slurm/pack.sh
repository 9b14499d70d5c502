#!/bin/bash
# Pack videos under Slurm: every task of a job array packs one share, then they are joined.
#
#   job=$(sbatch --parsable --array=0-15 slurm/pack.sh VIDEOS data/NAME)
#   sbatch --dependency=afterok:$job --wrap ".venv/bin/tubelet index data/NAME --merge"
#
# Submit it from the project folder. Options of `tubelet pack` may follow. A task that was killed, pre-empted or ran out
# of time goes on where it was when it is submitted again; one that is finished says so. To submit only some again:
#
#   sbatch --array=3,7 slurm/pack.sh VIDEOS data/NAME --slice slurm/16
#
# The destination may be a URL (s3://BUCKET/NAME). Then a task works in a folder of its own below the current one, or
# below `--work DIR`, where it takes up to twice the space of its share.
#
#SBATCH --job-name=tubelet-pack
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tubelet-pack-%A_%a.log

cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the project folder}" || exit 93
export PATH="$PWD/.venv/bin:$PATH"

exec python -m launch.cli pack --slice slurm "$@"
