#!/bin/bash
# For Vast.ai's ssh and jupyter modes, which put their own entrypoint in place of the image's: paste this as "onstart"
# (at most 4048 characters) and set ABLITERATION_COMMAND, e.g.
#   -e ABLITERATION_COMMAND='run Qwen/Qwen2.5-7B-Instruct --checkpoint hf://YOU/STATE-REPO --when-done stop'
# It runs at every start of the instance, and continues the job.
set -euo pipefail

workspace="${ABLITERATE_WORKSPACE:-/workspace}"
entrypoint="${ABLITERATION_ENTRYPOINT:-/entrypoint.sh}"
export PATH="/opt/abliterate/bin:$PATH"
mkdir -p "$workspace"

if [ -z "${ABLITERATION_COMMAND:-}" ]; then
    echo "onstart: nothing is started: set ABLITERATION_COMMAND to a command" >&2
    exit 0
fi
# The owner's own words, quoted as in a shell.
eval "set -- $ABLITERATION_COMMAND"

# The lock goes with the job, so a second start of this script leaves a running job alone.
exec 9>"$workspace/.onstart.lock"
if ! flock --nonblock 9; then
    echo "onstart: the job is already running" >&2
    exit 0
fi
# A session of its own, so that the end of this script is not the end of the job.
setsid "$entrypoint" "$@" >>"$workspace/abliterate.log" 2>&1 </dev/null &
echo "onstart: started; tail -f $workspace/abliterate.log" >&2
