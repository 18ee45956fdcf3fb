#!/bin/sh
# Runs `abliterate` with whatever the container is given: nothing (help), `run ...`, `abliterate run ...` or a shell.
set -eu
umask 022

export ABLITERATE_WORKSPACE="${ABLITERATE_WORKSPACE:-/workspace}"

# As the workspace's owner, so that nobody's files become root's. Platforms that mount it as root's get root, and so do
# those that allow no change of user.
owner="$(stat -c %u "$ABLITERATE_WORKSPACE" 2>/dev/null || echo 0)"
if [ "$(id -u)" = 0 ] && [ "$owner" != 0 ]; then
    become="setpriv --reuid=$owner --regid=$(stat -c %g "$ABLITERATE_WORKSPACE") --clear-groups --no-new-privs"
    if $become true; then
        export HOME=/home/abliterate USER=abliterate LOGNAME=abliterate
        exec $become "$0" "$@"
    fi
    echo "entrypoint: no change of user is allowed here; going on as root" >&2
fi

# Caches outlive the container, where it is one whose root may not be written at all.
export HF_HOME="${HF_HOME:-$ABLITERATE_WORKSPACE/.cache/huggingface}"
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$ABLITERATE_WORKSPACE/.cache}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$XDG_CACHE_HOME/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$XDG_CACHE_HOME/torchinductor}"
[ -w "${HOME:-/}" ] || export HOME=/tmp

# Some hosts show hundreds of cores to a container that may use a few, and nproc knows of no quota.
threads="${ABLITERATION_THREADS:-$(nproc)}"
if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ "$quota" != max ]; then
    allowed=$(((quota + period - 1) / period))
    [ "$threads" -le "$allowed" ] || threads=$allowed
fi
[ "$threads" -le 32 ] || threads=32
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"

case "${1:-}" in
bash | sh) exec "$@" ;;
*) exec abliterate "$@" ;;
esac
