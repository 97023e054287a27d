#!/usr/bin/env bash
# A Slurm of one node on this machine, without systemd: munged, slurmctld and slurmd in a scratch
# folder, each as the user who calls this, on ports of their own.
#
#   tests/slurm/setup.sh install        Debian's packages, once, as root
#   tests/slurm/setup.sh start FOLDER   starts it; prints the line that points srun and sbatch to it
#   tests/slurm/setup.sh stop FOLDER    ends its daemons and jobs
#
# `start` on a running one changes nothing.
set -euo pipefail

PACKAGES=(slurmctld slurmd slurm-client munge)
# More than this machine has: the tests wait for one another more than they compute.
CPUS=8

die() {
    echo "$0: $*" >&2
    exit 1
}

install_packages() {
    if command -v slurmctld slurmd munged sbatch >/dev/null; then
        return
    fi
    command -v apt-get >/dev/null || die "this needs Debian or Ubuntu; install ${PACKAGES[*]}"
    [ "$(id -u)" = 0 ] || die "run as root: apt-get install ${PACKAGES[*]}"
    {
        apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
                "${PACKAGES[@]}"
    } >&2 || die "apt-get could not install ${PACKAGES[*]}; see above"
}

free_ports() {
    python3 - "$1" <<'PYTHON'
import socket, sys
held = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in held:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in held))
PYTHON
}

write_configuration() {
    local folder=$1 node controller daemon
    node=$(hostname -s)
    read -r controller daemon <<<"$(free_ports 2)"
    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 600 "$folder/munge.key"
    mkdir -p "$folder/state" "$folder/spool"
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPort=$controller
SlurmdPort=$daemon
AuthType=auth/munge
# A job may start again only when the credentials of its last start have run out.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
# No control groups: this must work in a container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
InactiveLimit=0
MinJobAge=3600
GresTypes=gpu
NodeName=$node NodeAddr=127.0.0.1 CPUs=$CPUS Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF
    # Any devices will do: what is tested is who is told to use which.
    printf 'Name=gpu Flags=nvidia_gpu_env File=/dev/%s\n' null zero full random \
        >"$folder/gres.conf"
}

# The number in a file may be another process's by now.
alive() {
    local pid
    pid=$(cat "$1/$2.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] &&
        [ "$(cut -d' ' -f3 "/proc/$pid/stat" 2>/dev/null)" != Z ]
}

wait_for_end() {
    for _ in $(seq 25); do
        alive "$1" "$2" || return 0
        sleep 0.2
    done
}

start() {
    local folder=$1
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    # munged refuses a folder that others may write to or that it cannot be reached through.
    chmod 755 "$folder"
    [ -f "$folder/slurm.conf" ] || write_configuration "$folder"
    export SLURM_CONF=$folder/slurm.conf
    if ! alive "$folder" slurmctld; then
        munged --force --num-threads=2 --key-file="$folder/munge.key" \
            --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
            --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" ||
            die "munged did not start: $(tail -n 3 "$folder/munged.log" 2>/dev/null)"
        slurmctld -c || die "slurmctld did not start: $(tail -n 3 "$folder/slurmctld.log")"
        slurmd -c || die "slurmd did not start: $(tail -n 3 "$folder/slurmd.log")"
    fi
    for _ in $(seq 150); do
        if sinfo -h -o %t 2>/dev/null | grep -qE '^(idle|mix|alloc)'; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.2
    done
    die "the node is not ready: $(sinfo -N -l 2>&1; tail -n 5 "$folder"/slurm*.log)"
}

stop() {
    local folder name signal
    folder=$(cd "$1" && pwd)
    export SLURM_CONF=$folder/slurm.conf
    if alive "$folder" slurmctld; then
        scancel --user="$(id -un)" || true
    fi
    for name in slurmctld slurmd munged; do
        for signal in TERM KILL; do
            if alive "$folder" "$name"; then
                kill "-$signal" "$(cat "$folder/$name.pid")"
                wait_for_end "$folder" "$name"
            fi
        done
    done
}

case "${1:-}" in
install) install_packages ;;
start) start "${2:?folder}" ;;
stop) stop "${2:?folder}" ;;
*) die "install, start FOLDER or stop FOLDER" ;;
esac
