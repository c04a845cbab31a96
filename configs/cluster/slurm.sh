#!/usr/bin/env bash
# CLSA on several GPU machines of a SLURM cluster, one task per machine:
#
#   sbatch configs/cluster/slurm.sh --flagfile=configs/clsa.flags \
#       --workdir=/shared/runs/clsa
#
# All arguments after the script's name are passed to the training. The
# environment (or its activation below), data and --workdir have to be on
# storage that all machines share.
#
# SLURM sends SIGTERM a minute before it ends the job. The run then saves,
# exits with status 143 and is queued again to resume. The same happens after
# a machine was lost (status 138). `--strategy=auto` finds the other tasks.
#SBATCH --job-name=clsa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append

# . .venv/bin/activate

# If one task fails, end all of them. Otherwise the others would wait.
srun --kill-on-bad-exit=1 python -m clsa_tf.train "$@"
status=$?
if [ "$status" -eq 143 ] || [ "$status" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
