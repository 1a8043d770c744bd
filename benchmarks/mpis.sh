#!/bin/sh
# Compare all-reduce with the MPI library's own in each MPI that comes as a wheel: build one environment an MPI, then
# run collectives.py, which prints one table.
#   sh benchmarks/mpis.sh [--folder FOLDER] [--environments openmpi=PATH,mpich=PATH,intel=PATH] [OPTION...]
# --folder        where the environments are kept; build/mpis in the repository if not given
# --environments  take these as they are, and build none
# All other options are collectives.py's: --sizes, --dtypes, --buffers, --iterations, --json...
set -eu
repository=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=jobs/environment.sh
. "$repository/jobs/environment.sh"
ROOT=$repository

folder=$ROOT/build/mpis environments=''
while [ $# -gt 0 ]; do
    case $1 in
    --folder | --environments)
        [ $# -gt 1 ] || die "$1 wants a value"
        if [ "$1" = --folder ]; then folder=$2; else environments=$2; fi
        shift 2
        ;;
    *) break ;;
    esac
done

# build MPI: an environment with that MPI and mpillm in it.
build() (
    VIRTUAL_ENV=$folder/$1 MPILLM_MPI=$1
    if ! new_enough "$VIRTUAL_ENV/bin/python"; then
        ENVIRONMENT=$VIRTUAL_ENV
        mkdir -p "$ENVIRONMENT"
        make_venv
    fi
    if [ "$1" = intel ]; then
        # It has no extra of its own: mpillm finds it as it would a site's.
        MPILLM_MPI=site
        [ -x "$VIRTUAL_ENV/bin/mpirun" ] || "$VIRTUAL_ENV/bin/python" -m pip install --quiet \
            --disable-pip-version-check --constraint "$ROOT/constraints.txt" impi-rt
    fi
    prepare_environment ""
)

if [ -z "$environments" ]; then
    mkdir -p "$folder"
    folder=$(CDPATH='' cd -- "$folder" && pwd)
    for mpi in openmpi mpich intel; do
        build "$mpi"
        environments=$environments${environments:+,}$mpi=$folder/$mpi
    done
fi
any=${environments%%,*}
exec "${any#*=}/bin/python" "$ROOT/benchmarks/collectives.py" --environments "$environments" "$@"
