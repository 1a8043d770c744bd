#!/bin/sh
# Islands over a slow link: two hosts of one rank each, joined by 100 Mbit/s, train the quickstart's model; next to data
# parallel over the same link, and to islands that average once, at the end.
#   sh benchmarks/islands.sh [--data prepared/stdlib] [--rate 100mbit] [--steps N] [--sweep] [--folder FOLDER]
# --steps   400, or 240 of a sweep
# --sweep   instead: rounds, first steps and outer steps on one machine, with a smaller model
# --folder  where the runs are kept; build/islands in the repository if not given
# islands.py reads the runs and prints the tables.
set -eu
repository=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

die() {
    echo "islands.sh: $1" >&2
    exit 2
}

data=prepared/stdlib rate=100mbit steps='' sweep='' folder=$repository/build/islands
while [ $# -gt 0 ]; do
    case $1 in
    --sweep) sweep=1 ;;
    --data | --rate | --steps | --folder)
        [ $# -gt 1 ] || die "$1 wants a value"
        case $1 in
        --data) data=$2 ;;
        --rate) rate=$2 ;;
        --steps) steps=$2 ;;
        --folder) folder=$2 ;;
        esac
        shift
        ;;
    *) die "unknown option $1; there are --data, --rate, --steps, --sweep and --folder" ;;
    esac
    shift
done
[ -f "$data/manifest.json" ] || die "$data is no dataset; make it with mpillm prepare stdlib --out $data --vocab-size 2048"
[ -n "$steps" ] || steps=$([ -n "$sweep" ] && echo 240 || echo 400)
mkdir -p "$folder"

# train NAME SETTING...: a run, unless it has ended already.
train() {
    name=$1
    shift
    if [ "$(cat "$folder/$name/outcome" 2>/dev/null)" = finished ]; then
        return
    fi
    rm -rf "${folder:?}/$name"
    echo "$name: $*" >&2
    set -- "$@" "train.steps=$steps" "train.save_every=0" "data.path=$data" "train.run=$folder/$name"
    arguments=''
    for setting; do arguments="$arguments --set $setting"; done
    # shellcheck disable=SC2086 # settings without spaces
    $start python -m mpillm train "$repository/jobs/recipes/quickstart.toml" $arguments >"$folder/$name.log" 2>&1 ||
        die "$name failed: see $folder/$name.log"
}

if [ -n "$sweep" ]; then
    start='mpirun -n 2'
    small='model.layers=2 model.width=128 model.heads=4 model.context=64 optimizer.learning_rate=2e-3
        optimizer.warmup_steps=20 train.evaluate_every=0'
    # shellcheck disable=SC2086 # a list
    train data-parallel $small
    # every:from:rate:momentum
    for case in 30:0:1:0 30:60:1:0 30:60:0.7:0.5 10:60:0.7:0.5 30:60:1:0.5 10:60:1:0.5 60:60:1:0.5 30:0:1:0.5 \
        30:60:1:0.7; do
        every=${case%%:*} rest=${case#*:}
        first=${rest%%:*} outer=${rest#*:}
        # shellcheck disable=SC2086 # a list
        train "island-$case" $small parallel.island=2 "parallel.island_every=$every" "parallel.island_from=$first" \
            "parallel.island_rate=${outer%%:*}" "parallel.island_momentum=${outer#*:}"
    done
else
    # A quarter of the steps together, then rounds. Evaluations come at the end of a round.
    first=$((steps / 4 / 30 * 30))
    start="sh $repository/tests/fixtures/two_hosts.sh --rate $rate"
    islands="parallel.island=2 parallel.island_every=30 parallel.island_from=$first"
    train data-parallel train.evaluate_every=30
    # shellcheck disable=SC2086 # a list
    train islands $islands train.evaluate_every=30
    # shellcheck disable=SC2086 # a list
    train islands-bfloat16 $islands parallel.island_dtype=bfloat16 train.evaluate_every=30
    # The bound: no message but the step's numbers, up to one average at the end.
    train alone parallel.island=2 "parallel.island_every=$steps" train.evaluate_every=0
fi
python "$repository/benchmarks/islands.py" "$folder"
