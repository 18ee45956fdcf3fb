#!/bin/sh
# Runs `abliterate` with whatever the container is given: nothing (help), `run ...`, `abliterate run ...` or a shell.
set -eu
umask 022

export ABLITERATE_WORKSPACE="${ABLITERATE_WORKSPACE:-/workspace}"

# As the workspace's owner, so that nobody's files become root's; also a shell, whose files the job meets later. As root only
# where the workspace is root's, or where no change of user is allowed. One that is not there yet is judged by its folder.
place="$ABLITERATE_WORKSPACE"
while [ ! -e "$place" ]; do place="$(dirname -- "$place")"; done
as_root=
if [ "$(id -u)" = 0 ]; then
    owner="$(stat -L -c %u -- "$place")"
    if [ "$owner" != 0 ]; then
        become="setpriv --reuid=$owner --regid=$(stat -L -c %g -- "$place") --clear-groups --no-new-privs"
        if refused="$($become true 2>&1)"; then
            export HOME=/home/abliterate USER=abliterate LOGNAME=abliterate
            exec $become "$0" "$@"
        fi
        as_root="no change of user is allowed here ($refused)"
    else
        as_root="$place belongs to root; chown it to run as its owner"
    fi
fi
# PID 1 has to pass signals on and reap. Only now, because tini is a process as well, and stays whose it was.
if [ $$ = 1 ] && command -v tini >/dev/null; then exec tini -- "$0" "$@"; fi
[ -z "$as_root" ] || echo "entrypoint: running as root: $as_root" >&2

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
