#!/bin/sh
# The main job on this machine: text in, a model that answers out. `sh jobs/quickstart.sh [--short] [--ranks N]`
set -eu
# shellcheck source=jobs/environment.sh
. "$(dirname -- "$0")/environment.sh"

name=quickstart steps='' ranks=2
while [ $# -gt 0 ]; do
    case $1 in
    --short) name=quickstart-short steps=60 ;;
    --ranks)
        [ $# -gt 1 ] || die "--ranks wants a number"
        ranks=$2
        shift
        ;;
    *) die "unknown option $1; quickstart.sh takes --short and --ranks N" ;;
    esac
    shift
done

prepare_environment ""
folder=${MPILLM_QUICKSTART:-$ROOT}
mkdir -p "$folder"
cd "$folder"
run=runs/$name

mpillm_on_ranks() {
    echo
    echo "\$ mpirun -n $ranks mpillm $*"
    run_ranks "$ranks" mpillm "$@"
}

mpillm_on_ranks prepare stdlib --out prepared/stdlib --vocab-size 2048
set -- "$ROOT/jobs/recipes/quickstart.toml" --set "train.run=$run"
[ -z "$steps" ] || set -- "$@" --set "train.steps=$steps"
[ ! -d "$run" ] || set -- "$@" --resume
mpillm_on_ranks train "$@"
mpillm_on_ranks evaluate "$run" --baselines
echo
echo "\$ mpillm generate $run --prompt 'class Node:' --max-tokens 150"
run_ranks 1 mpillm generate "$run" --prompt 'class Node:' --max-tokens 150
