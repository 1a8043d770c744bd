#!/bin/sh
# The whole suite: serially, then under mpirun at 2, 3 and 4 ranks.
#   sh jobs/test.sh [--fast | --every] [--mpi openmpi|mpich|system] [--ranks 1,2,3,4] [pytest arguments...]
# --fast   one rank, and no test that starts processes of its own: the quickest look
# --every  each test at each number of ranks. Without it, and without pytest arguments, a test of training or inference
#          has its turn at one of 2, 3 and 4 ranks, and a third of them serially
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

# The tests of one rank in three groups side by side: Slurm's, which mostly wait for its timers, those that start no
# processes and then two rooms of those that do, and the other rooms. The last group stays in the foreground, for a
# background job ignores Ctrl-C.
serial_pass() {
    logs=$(mktemp -d) result=0
    run_ranks 1 python -m pytest -q --color=no -m slurm >"$logs/slurm" 2>&1 &
    slurm=$!
    {
        run_ranks 1 python -m pytest -q --color=no ${turns:+"$turns"} -m "fast and not slurm" || result=$?
        run_ranks 1 python -m pytest -q --color=no ${turns:+"$turns"} -m "not slurm and not fast" tests/comm tests/parallel ||
            result=$?
        exit "$result"
    } >"$logs/fast" 2>&1 &
    first=$!
    trap 'kill "$slurm" "$first" 2>/dev/null; rm -rf "$logs"' EXIT
    trap 'exit 130' INT TERM
    run_ranks 1 python -m pytest -q --color=no ${turns:+"$turns"} -m "not slurm and not fast" \
        --ignore=tests/comm --ignore=tests/parallel || result=$?
    wait "$first" || result=$?
    wait "$slurm" || result=$?
    cat "$logs/fast" "$logs/slurm"
    rm -rf "$logs"
    trap - EXIT INT TERM
    return "$result"
}

ranks='1 2 3 4' asked='' fast='' every=''
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
    --every)
        every=yes
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
turns=''
[ $# -gt 0 ] || [ -n "$every" ] || turns=--turns
passed=''
for n in $ranks; do
    if [ "$n" -eq 1 ]; then
        echo "== the ${fast:+fast }suite, serially =="
    else
        echo "== the suite at $n ranks =="
    fi
    if [ "$n" -eq 1 ] && [ $# -eq 0 ]; then
        serial_pass
    else
        run_ranks "$n" python -m pytest -q --color=no ${turns:+"$turns"} "$@"
    fi
    passed=$passed${passed:+, }$n
done
case $passed in
*,*) passed="${passed%, *} and ${passed##*, } ranks" ;;
1) passed="1 rank" ;;
*) passed="$passed ranks" ;;
esac
echo "the ${fast:+fast }suite passes at $passed${asked:+ with $asked}"
