#!/bin/sh
# The main job on this machine: text in, a model that answers out. `sh jobs/quickstart.sh [--short] [--ranks N]`
# The data and the run lie in the repository, or in the folder that MPILLM_QUICKSTART names. Run again, it goes on.
set -eu
# shellcheck source=jobs/environment.sh
. "$(dirname -- "$0")/environment.sh"

name=quickstart steps='' ranks=2
while [ $# -gt 0 ]; do
    case $1 in
    --short) name=quickstart-short steps=60 ;;
    --ranks)
        case ${2:-} in '' | 0* | *[!0-9]*) die "--ranks wants a number from 1, such as --ranks 2" ;; esac
        ranks=$2
        shift
        ;;
    *) die "unknown option $1; quickstart.sh takes --short and --ranks N" ;;
    esac
    shift
done

prepare_environment train
folder=${MPILLM_QUICKSTART:-$ROOT}
mkdir -p "$folder"
cd "$folder"
run=runs/$name
recipe=jobs/recipes/quickstart.toml
[ -f "$recipe" ] || recipe=$ROOT/$recipe

# Say a command as one would type it, then run it: say_and_run RANKS VERB...
say_and_run() {
    processes_wanted=$1
    shift
    shown=mpillm
    [ "$processes_wanted" -eq 1 ] || shown="mpirun -n $processes_wanted mpillm"
    for word; do
        case $word in *' '*) word="'$word'" ;; esac
        shown="$shown $word"
    done
    printf '\n$ %s\n' "$shown"
    run_ranks "$processes_wanted" mpillm "$@"
}

set -- "$recipe" --set "train.run=$run" ${steps:+--set "train.steps=$steps"}
[ ! -d "$run" ] || set -- "$@" --resume

say_and_run "$ranks" prepare stdlib --out prepared/stdlib --vocab-size 2048
say_and_run "$ranks" train "$@"
say_and_run "$ranks" evaluate "$run" --baselines
say_and_run 1 generate "$run" --prompt 'class Node:' --max-tokens 150
