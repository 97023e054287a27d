#!/usr/bin/env bash
# Several processes of one run on this machine.
#
#   launch/local.sh N [--gpus] COMMAND [ARGUMENT…]
#   launch/local.sh 4 brgsa train --config phantom --config.data.path=data/phantom
#   launch/local.sh 8 --gpus brgsa train --config brgsa --workdir runs/a --config.data.path=data/a
#
# Without --gpus the processes compute on the CPU, with one device each, and talk by gloo. With it
# each has one of the GPUs that CUDA_VISIBLE_DEVICES names, or of all.
#
# BRGSA_LOGS           folder for the output of each process [a new one below /tmp]
# BRGSA_START_TIMEOUT  seconds within which the processes must have met [300]
#
# Process 0 also writes to this terminal. Ctrl-C and SIGTERM go to all processes. The first one that
# fails ends all; the end of its log is shown. Exit code: 0, that of the first failure, 143 when the
# run was asked to stop and saved its state, 130 after Ctrl-C.
set -uo pipefail
# Each process in a group of its own: Ctrl-C reaches it through this script, and only once.
set -m

# Seconds that processes may take to end when another has failed.
GRACE=15

usage() {
    echo "usage: $0 N [--gpus] COMMAND [ARGUMENT…]   (N processes; see the head of this file)" >&2
    exit 2
}

case "${1:-}" in
'' | *[!0-9]* | 0*) usage ;;
esac
count=$1
shift
gpus=()
if [ "${1:-}" = --gpus ]; then
    shift
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    else
        while read -r number; do gpus+=("$number"); done < <(
            nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)
    fi
    if [ "${#gpus[@]}" -lt "$count" ]; then
        echo "$0: $count processes need $count GPUs, this machine shows ${#gpus[@]}" >&2
        exit 1
    fi
fi
[ $# -gt 0 ] || usage

logs=${BRGSA_LOGS:-$(mktemp -d -t brgsa-logs.XXXXXX)}
mkdir -p "$logs" || exit 1
port=$("${PYTHON:-python3}" -c 'import socket
with socket.create_server(("localhost", 0)) as one:
    print(one.getsockname()[1])') || exit 1

start() {
    local index=$1
    shift
    export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$index
    if [ "${#gpus[@]}" -gt 0 ]; then
        export CUDA_VISIBLE_DEVICES=${gpus[$index]} JAX_PLATFORMS=cuda,cpu
    else
        export JAX_PLATFORMS=cpu
    fi
    exec "$@"
}

pids=() codes=()
signal_all() {
    local index
    for index in "${!pids[@]}"; do
        if [ -z "${codes[$index]}" ]; then
            kill "-$1" -- "-${pids[$index]}" 2>/dev/null
        fi
    done
}

interrupted=
trap 'interrupted=130; signal_all INT' INT
trap 'signal_all TERM' TERM

echo "$count processes; their output: $logs/0.log …" >&2
for ((index = 0; index < count; index++)); do
    : >"$logs/$index.log"
    (start "$index" "$@") >>"$logs/$index.log" 2>&1 &
    pids+=("$!")
    codes+=('')
done
tail -n +1 -f "$logs/0.log" &
shown=$!

# The greatest code of the first moment: that of a process that was killed, for which others failed.
worst=0 failed='' stopped=no deadline=''
note_end() {
    codes[$1]=$2
    case $2 in
    0) ;;
    143) stopped=yes ;;
    *) if [ "${deadline:-0}" = 0 ] && [ "$2" -gt "$worst" ]; then worst=$2 failed=$1; fi ;;
    esac
}

running=$count
while [ "$running" -gt 0 ]; do
    # In the background, so that a signal is handled at once.
    sleep 0.2 &
    wait "$!" 2>/dev/null
    running=0
    for index in "${!pids[@]}"; do
        if [ -z "${codes[$index]}" ]; then
            if kill -0 "${pids[$index]}" 2>/dev/null; then
                running=$((running + 1))
            else
                wait "${pids[$index]}" 2>/dev/null
                note_end "$index" "$?"
            fi
        fi
    done
    # After a Ctrl-C they end by themselves; a second one is passed on as well.
    if [ "$worst" -gt 0 ] && [ "$running" -gt 0 ] && [ -z "$interrupted" ]; then
        if [ -z "$deadline" ]; then
            deadline=0
        elif [ "$deadline" = 0 ]; then
            deadline=$((SECONDS + GRACE))
            signal_all TERM
        elif [ "$SECONDS" -ge "$deadline" ]; then
            signal_all KILL
        fi
    fi
done
# For what was written last.
sleep 0.3
kill "$shown" 2>/dev/null
wait "$shown" 2>/dev/null

if [ -n "$interrupted" ]; then
    exit "$interrupted"
fi
if [ "$worst" -gt 0 ]; then
    echo "$0: process $failed ended with $worst; the end of $logs/$failed.log:" >&2
    tail -n 20 "$logs/$failed.log" >&2
    exit "$worst"
fi
[ "$stopped" = no ] || exit 143
