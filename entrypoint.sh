#!/bin/sh
# Runs `abliterate` with whatever the container is given: nothing (help), `run ...`, `abliterate run ...` or a shell.
set -eu
umask 022

# Some hosts show hundreds of cores to a container that may use a few: thread pools go by what is allowed.
threads="${ABLITERATION_THREADS:-$(nproc)}"
[ "$threads" -le 32 ] || threads=32
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
export HF_HOME="${HF_HOME:-/workspace/.cache/huggingface}"

case "${1:-}" in
bash | sh) exec "$@" ;;
*) exec abliterate "$@" ;;
esac
