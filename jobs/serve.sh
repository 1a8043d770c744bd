#!/bin/bash
#SBATCH --job-name=mpillm-serve
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=4:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --output=serve-%j.out
#PBS -N mpillm-serve
#PBS -l select=1:ncpus=1:mpiprocs=1
#PBS -l walltime=4:00:00
#PBS -j oe
#BSUB -J mpillm-serve
#BSUB -n 1
#BSUB -W 4:00
#BSUB -o serve-%J.out
# Serve a model in a batch job of Slurm, PBS or LSF; the output has the command of the tunnel to it.
#   sbatch --nodes 2 jobs/serve.sh runs/chat
#   qsub -v MPILLM_SERVE='runs/chat --port 0' jobs/serve.sh
#   bsub -n 2 jobs/serve.sh runs/chat
# What its command line says of nodes, time and output counts, and not the lines above. What may be set from outside:
#   MPILLM_SERVE='runs/chat --port 0'  the words after `mpillm serve`, where the batch system passes none on
#   MPILLM_LAUNCH='mpirun -n 2'        how ranks are started; else srun in a job of Slurm, and mpirun elsewhere
#   MPILLM_SERVE_AGAIN=1               Slurm: queue the job again once it has drained
set -u

say() {
    printf '[%s] %s\n' "$(date '+%F %T')" "$1"
}

words=("$@")
[ $# -gt 0 ] || read -ra words <<<"${MPILLM_SERVE:-}"
if [ ${#words[@]} -eq 0 ]; then
    echo "jobs/serve.sh needs a run to serve: sbatch jobs/serve.sh runs/chat, or MPILLM_SERVE='runs/chat'" >&2
    exit 2
fi
# PBS starts a job in the home folder.
cd -- "${PBS_O_WORKDIR:-$PWD}" || exit 1
if [ -n "${MPILLM_LAUNCH:-}" ]; then
    read -ra launch <<<"$MPILLM_LAUNCH"
elif [ -n "${SLURM_JOB_ID:-}" ]; then
    launch=(srun --kill-on-bad-exit=0 --wait=60)
else
    launch=(mpirun)
fi
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

# A trapped signal ends `wait` early, so each is counted.
signals=0 step=''
pass_on() {
    signals=$((signals + 1))
    say "SIG$1: passed on to the ranks"
    [ -z "$step" ] || kill -"$1" "$step" 2>/dev/null
}
drain() {
    pass_on USR1
}
stop() {
    pass_on TERM
}
trap drain USR1
trap stop TERM INT

"${launch[@]}" python -m mpillm serve "${words[@]}" &
step=$!
while
    seen=$signals
    wait "$step"
    code=$?
    [ "$signals" -ne "$seen" ]
do
    :
done
say "the server ended with exit code $code"
if [ "$code" -eq 75 ] && [ -n "${MPILLM_SERVE_AGAIN:-}" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    say "queueing the job again"
    # It ends this shell.
    scontrol requeue "$SLURM_JOB_ID" && sleep 300
fi
# The script's own exit code.
(exit "$code")
