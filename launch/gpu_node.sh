#!/usr/bin/env bash
# One process that trains on all GPUs of this machine.
#
#   launch/gpu_node.sh [--pmap] ARGUMENT…      the arguments are those of brgsa train
#   launch/gpu_node.sh --config brgsa --workdir runs/a --config.data.path=data/a
#
# --pmap keeps a whole copy of the state on every GPU (train.parallel=pmap) in place of the mesh.
# CUDA_VISIBLE_DEVICES limits the GPUs. SIGTERM saves and ends with 143; the same command goes on.
set -euo pipefail

changes=()
if [ "${1:-}" = --pmap ]; then
    shift
    changes=(--config.train.parallel=pmap)
fi
if [ $# = 0 ]; then
    echo "usage: $0 [--pmap] ARGUMENT…   (those of brgsa train; see the head of this file)" >&2
    exit 2
fi
if ! nvidia-smi -L; then
    echo "$0: this machine shows no NVIDIA GPU" >&2
    exit 1
fi
# Without a working driver JAX would train on the CPU and say little about it.
export JAX_PLATFORMS=cuda,cpu
exec brgsa train "$@" ${changes[@]+"${changes[@]}"}
