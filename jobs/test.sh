#!/bin/sh
# The whole suite: serially, then under mpirun at 2, 3 and 4 ranks. `sh jobs/test.sh [pytest arguments...]`
set -eu
# shellcheck source=jobs/environment.sh
. "$(dirname -- "$0")/environment.sh"

prepare_environment dev
cd "$ROOT"
OMP_NUM_THREADS=1
export OMP_NUM_THREADS
for ranks in 1 2 3 4; do
    echo "== the suite at $ranks rank(s) =="
    run_ranks "$ranks" pytest -q --color=no "$@"
done
echo "the suite passes at 1, 2, 3 and 4 ranks"
