#!/bin/sh
# A command under mpirun over two hosts, on one machine: two network namespaces with names of their own, joined by a
# link that is held to a rate both ways.
#   sh tests/peers/two_hosts.sh [--rate 1gbit] [--ranks-per-host 1] [--mpi openmpi|mpich|intel] COMMAND...
# --rate            as tc writes rates; `none` leaves the link as fast as the machine
# --ranks-per-host  a number, or one for each host: 2,1
# --mpi             whose mpirun stands on PATH; else it is asked
# Needs root, or a kernel that gives user namespaces; where they can't be had it ends with status 77. All of it lives
# in namespaces of its own and ends with the command: nothing is left behind.
set -eu

UNAVAILABLE=77

die() {
    echo "two_hosts.sh: $1" >&2
    exit "${2:-1}"
}

lacks() {
    die "two hosts cannot be had here: $1" "$UNAVAILABLE"
}

# ---- outside: read the options, then start again inside new namespaces ----

read_options() {
    rate=1gbit ranks=1 mpi=''
    while [ $# -gt 0 ]; do
        case $1 in
        --rate | --ranks-per-host | --mpi)
            [ $# -gt 1 ] || die "$1 wants a value"
            ;;
        --*) die "unknown option $1; there are --rate, --ranks-per-host and --mpi" ;;
        *) break ;;
        esac
        case $1 in
        --rate) rate=$2 ;;
        --ranks-per-host) ranks=$2 ;;
        --mpi) mpi=$2 ;;
        esac
        shift 2
    done
    [ $# -gt 0 ] || die "there is no command to run"
    case $ranks in
    '' | *[!0-9,]* | ,* | *, | *,*,*) die "--ranks-per-host wants a number such as 2, or two such as 2,1; not $ranks" ;;
    esac
    case $rate in
    none | [0-9]*bit) ;;
    *) die "--rate wants bits a second such as 1gbit or 200mbit, or none; not $rate" ;;
    esac
    words=$#
}

find_mpi() {
    mpirun=$(command -v mpirun) || die "there is no mpirun on PATH"
    if [ -z "$mpi" ]; then
        case $("$mpirun" --version 2>&1) in
        *Intel*) mpi=intel ;;
        *HYDRA* | *MPICH*) mpi=mpich ;;
        *"Open MPI"* | *OpenRTE* | *PRRTE*) mpi=openmpi ;;
        *) die "whose mpirun is $mpirun? say --mpi openmpi, mpich or intel" ;;
        esac
    fi
    # mpirun starts the other host's daemon through a shell, and quotes no path.
    case $mpirun in *' '*) lacks "$mpirun lies in a folder with a space in its name" ;; esac
    case $mpi in
    openmpi | mpich | intel) ;;
    *) die "--mpi is openmpi, mpich or intel, not $mpi" ;;
    esac
}

enter_namespaces() {
    # Where ip and tc lie, and where not every user's PATH leads.
    PATH=$PATH:/usr/sbin:/sbin
    export PATH
    for tool in unshare ip tc hostname; do
        command -v "$tool" >/dev/null || lacks "there is no $tool on PATH"
    done
    user=''
    [ "$(id -u)" -eq 0 ] || user='--user --map-root-user'
    # shellcheck disable=SC2086 # two words, or none
    unshare $user --mount --net --uts --pid --fork true 2>/dev/null ||
        lacks "the kernel gives no namespaces; be root, or allow user namespaces"
    # Whoever ends unshare ends all that runs in its process namespace.
    # shellcheck disable=SC2086
    exec unshare $user --mount --net --uts --pid --fork --kill-child --mount-proc \
        sh "$0" --inside "$rate" "$ranks" "$mpi" "$mpirun" "$@"
}

# ---- inside: hosts, link, mpirun ----

make_host() {
    ip netns add "$1"
    # An IPv6 address is tentative for its first second, in which no one may use it.
    ip netns exec "$1" sh -c 'echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6' 2>/dev/null || true
    ip -n "$1" link set lo up
}

make_link() {
    ip link add eth0 netns host1 type veth peer name eth0 netns host2
    for number in 1 2; do
        ip -n "host$number" address add "192.0.2.$number/24" dev eth0
        ip -n "host$number" link set eth0 up
        [ "$rate" = none ] || tc -n "host$number" qdisc add dev eth0 root tbf rate "$rate" burst 256kb latency 50ms
    done
    for number in 1 2; do
        # libfabric passes over a link that is not up yet.
        until ip -n "host$number" link show eth0 | grep -q 'state UP'; do sleep 0.05; done
    done
}

# What the launchers take for ssh: [options] HOST COMMAND. Each host has shared memory of its own, too.
write_agent() {
    cat >/run/agent <<'AGENT'
#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1
shift
exec ip netns exec "$host" unshare --mount --uts sh -c '
    hostname "$0" && mount -t tmpfs -o mode=1777 tmpfs /dev/shm && eval "$1"' "$host" "$*"
AGENT
    chmod +x /run/agent
}

make_hosts() {
    # Everything below is seen from in here alone.
    mount -t tmpfs tmpfs /run
    mkdir -p /run/netns /run/tmp
    printf '127.0.0.1 localhost\n192.0.2.1 host1\n192.0.2.2 host2\n' >/run/hosts
    mount --bind /run/hosts /etc/hosts
    make_host host1
    make_host host2
    make_link
    write_agent
}

set_environment() {
    # mpirun has the same process number in every run: its session's folder must not meet another run's.
    export TMPDIR=/run/tmp
    # UCX and libfabric would notice that both hosts run on one kernel, and leave the link aside.
    export UCX_TLS=tcp,self UCX_NET_DEVICES=eth0 FI_PROVIDER=tcp FI_TCP_IFACE=eth0 GLOO_SOCKET_IFNAME=eth0
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export OMPI_MCA_pml="${OMPI_MCA_pml:-ob1}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    first=${ranks%,*} second=${ranks#*,}
    if [ $((first + second)) -gt "$(nproc)" ]; then
        # Each host believes that it has all cores to itself. MPICH has such a setting too, and is slower by it.
        export OMPI_MCA_mpi_yield_when_idle="${OMPI_MCA_mpi_yield_when_idle:-1}"
        export I_MPI_WAIT_MODE="${I_MPI_WAIT_MODE:-1}"
    fi
}

# run_inside COMMAND...: on the first host, from where the agent reaches the second.
run_inside() {
    case $mpi in
    openmpi)
        # The first name is Open MPI 5's, the second 4's.
        export PRTE_MCA_plm_ssh_agent=/run/agent OMPI_MCA_plm_rsh_agent=/run/agent
        set -- --host "host1:$first,host2:$second" --map-by slot:OVERSUBSCRIBE --bind-to none "$@"
        ;;
    mpich) set -- -launcher ssh -launcher-exec /run/agent -hosts "host1:$first,host2:$second" "$@" ;;
    intel)
        printf 'host1:%s\nhost2:%s\n' "$first" "$second" >/run/machines
        set -- -bootstrap ssh -bootstrap-exec /run/agent -machinefile /run/machines \
            -genv I_MPI_FABRICS shm:ofi -genv I_MPI_PIN 0 "$@"
        ;;
    esac
    exec ip netns exec host1 unshare --mount --uts sh -c \
        'hostname host1 && mount -t tmpfs -o mode=1777 tmpfs /dev/shm && exec "$@"' sh \
        "$mpirun" -n $((first + second)) "$@" </dev/null
}

if [ "${1:-}" = --inside ]; then
    rate=$2 ranks=$3 mpi=$4 mpirun=$5
    shift 5
    trap 'lacks "the hosts or the link between them cannot be made, for the reason above"' EXIT
    make_hosts
    trap - EXIT
    set_environment
    run_inside "$@"
fi
read_options "$@"
shift $(($# - words))
find_mpi
enter_namespaces "$@"
