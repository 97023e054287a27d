#!/usr/bin/env bash
# A TPU slice of Google Cloud from creation to deletion. Prints each command before it runs it.
#
#   launch/tpu_pod.sh [--dry-run] create            the machines, with this checkout installed
#   launch/tpu_pod.sh [--dry-run] install           this checkout on every worker, again
#   launch/tpu_pod.sh [--dry-run] run COMMAND…      on every worker, once
#   launch/tpu_pod.sh [--dry-run] resume COMMAND…   until it has finished: after a preemption it
#                                                   deletes what is left, creates, and runs again
#   launch/tpu_pod.sh [--dry-run] delete
#
#   export TPU_NAME=a TPU_ZONE=… TPU_TYPE=v5litepod-16
#   launch/tpu_pod.sh create
#   launch/tpu_pod.sh resume brgsa train --config brgsa --workdir /mnt/runs/a \
#       --config.data.path=/mnt/data/a
#   launch/tpu_pod.sh delete
#
# --dry-run only prints. From the environment:
#
# TPU_NAME      name of the slice
# TPU_ZONE      zone
# TPU_TYPE      accelerator type (create, resume)
# TPU_VERSION   software of the machines [tpu-ubuntu2204-base]
# TPU_PROJECT   project [that of gcloud's configuration]
# TPU_SPOT      1 takes machines that may be preempted [0]
# TPU_SETUP     command run on every worker after the installation, such as the one that mounts the
#               file system of data and work directories, which all workers must share
# TPU_RETRY     seconds between attempts to get machines again [60]
set -euo pipefail

dry=no
if [ "${1:-}" = --dry-run ]; then
    dry=yes
    shift
fi

usage() {
    echo "usage: $0 [--dry-run] create|install|delete|run COMMAND…|resume COMMAND…" >&2
    exit 2
}

# Values become arguments of gcloud: none may be taken for an option.
value_of() {
    local value=${!1:-}
    if [ -z "$value" ]; then
        echo "$0: set $1; the head of this file says to what" >&2
        exit 2
    fi
    if ! [[ $value =~ ^[a-zA-Z0-9][a-zA-Z0-9.:_-]*$ ]]; then
        echo "$0: $1 must be of letters, digits and .:_- and begin with one of the first two" >&2
        exit 2
    fi
    printf '%s' "$value"
}

say() {
    printf '+' >&2
    printf ' %q' "$@" >&2
    printf '\n' >&2
}

act() {
    say "$@"
    [ "$dry" = yes ] || "$@"
}

[ $# -gt 0 ] || usage
name=$(value_of TPU_NAME)
zone=$(value_of TPU_ZONE)
where=("--zone=$zone")
if [ -n "${TPU_PROJECT:-}" ]; then
    project=$(value_of TPU_PROJECT)
    where+=("--project=$project")
fi
tpu=(gcloud compute tpus tpu-vm)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

on_workers() {
    act "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all --command="$1"
}

create() {
    local type version options=()
    type=$(value_of TPU_TYPE)
    version=${TPU_VERSION:-tpu-ubuntu2204-base}
    version=$(TPU_VERSION=$version value_of TPU_VERSION)
    [ "${TPU_SPOT:-0}" != 1 ] || options=(--spot)
    act "${tpu[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" \
        "--version=$version" ${options[@]+"${options[@]}"}
    install_checkout
}

install_checkout() {
    local archive
    archive=$(mktemp -t brgsa.XXXXXX.tar.gz)
    # What git tracks, as it is now.
    act git -C "$here" archive --format=tar.gz "--output=$archive" HEAD
    act "${tpu[@]}" scp "$archive" "$name:brgsa.tar.gz" "${where[@]}" --worker=all
    rm -f "$archive"
    # The machines' own Python may be older than 3.11, which uv brings along.
    on_workers 'set -e; rm -rf brgsa; mkdir brgsa; tar -xzf brgsa.tar.gz -C brgsa; cd brgsa
python3 -m pip install -q --user uv
python3 -m uv venv -q --allow-existing --python 3.11 ~/venv
python3 -m uv pip install -q --python ~/venv/bin/python -c constraints.txt -e ".[tpu]"'
    if [ -n "${TPU_SETUP:-}" ]; then
        on_workers "$TPU_SETUP"
    fi
}

run() {
    local command
    printf -v command ' %q' "$@"
    on_workers "PATH=\$HOME/venv/bin:\$PATH exec$command"
}

delete() {
    act "${tpu[@]}" delete "$name" "${where[@]}" --quiet
}

state() {
    "${tpu[@]}" describe "$name" "${where[@]}" '--format=value(state)' 2>/dev/null || echo NONE
}

resume() {
    local code now
    while :; do
        code=0
        run "$@" || code=$?
        if [ "$dry" = yes ]; then
            say "${tpu[@]}" describe "$name" "${where[@]}" '--format=value(state)'
            echo "# finished: ends; preempted, or asked to stop (143): the following, then again" >&2
            delete
            create
            return
        fi
        now=$(state)
        echo "$(date '+%F %T') ended with $code; the slice is $now" >&2
        if [ "$now" = READY ]; then
            # Exit code 143: the run saved its state when it was asked to stop.
            [ "$code" = 143 ] || return "$code"
        else
            [ "$now" = NONE ] || delete || true
            until create; do
                echo "no machines; trying again in ${TPU_RETRY:-60} s" >&2
                sleep "${TPU_RETRY:-60}"
                case $(state) in
                NONE) ;;
                READY) break ;;
                *) delete || true ;;
                esac
            done
        fi
    done
}

what=$1
shift
case $what in
create | install | delete) [ $# = 0 ] || usage ;;
run | resume) [ $# -gt 0 ] || usage ;;
*) usage ;;
esac
case $what in
install) install_checkout ;;
*) "$what" "$@" ;;
esac
