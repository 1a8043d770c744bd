#!/bin/sh
# The whole suite: serially, then under mpirun at 2, 3 and 4 ranks. `sh jobs/test.sh [pytest arguments...]`
set -eu
# shellcheck source=jobs/environment.sh
. "$(dirname -- "$0")/environment.sh"

prepare_environment dev
cd "$ROOT"
export OMP_NUM_THREADS=1
echo "== the suite, serially =="
run_ranks 1 pytest -q --color=no "$@"
for ranks in 2 3 4; do
    echo "== the suite at $ranks ranks =="
    run_ranks "$ranks" pytest -q --color=no "$@"
done
echo "the suite passes at 1, 2, 3 and 4 ranks"
