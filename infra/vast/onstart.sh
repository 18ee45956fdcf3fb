#!/bin/bash
# For Vast.ai's ssh and jupyter modes, which put their own entrypoint in place of the image's: paste this as "onstart"
# (at most 4048 characters) and set ABLITERATION_COMMAND, e.g.
#   -e ABLITERATION_COMMAND='run Qwen/Qwen2.5-7B-Instruct --checkpoint hf://YOU/STATE-REPO --when-done stop'
# It runs at every start of the instance, and continues the job. On an image that is not ours, such as PyTorch's, set
# ABLITERATION_WHEEL too: the URL or path of our wheel, which is then installed for ABLITERATION_PYTHON (python3).
set -euo pipefail

workspace="${ABLITERATE_WORKSPACE:-/workspace}"
command=("${ABLITERATION_ENTRYPOINT:-/entrypoint.sh}")
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
if [ -n "${ABLITERATION_WHEEL:-}" ]; then
    python="${ABLITERATION_PYTHON:-python3}"
    echo "onstart: installing $ABLITERATION_WHEEL" >&2
    log="$workspace/abliterate.log"
    for wait in 5 30 0; do
        "$python" -m pip install --quiet --no-input "$ABLITERATION_WHEEL" 9>&- 2>>"$log" && break
        [ "$wait" = 0 ] && echo "onstart: no job is running, and the machine bills on: pip failed" | tee -a "$log" >&2 && exit 1
        sleep "${ABLITERATION_RETRY:-$wait}"
    done
    command=("$python" -P -m job) # -P: the wheel's, whatever folder this starts in
fi
# As the image's own entry point does.
export ABLITERATE_WORKSPACE="$workspace" HF_HOME="${HF_HOME:-$workspace/.cache/huggingface}"
# A session of its own, so that the end of this script is not the end of the job.
setsid "${command[@]}" "$@" >>"$workspace/abliterate.log" 2>&1 </dev/null &
echo "onstart: started; tail -f $workspace/abliterate.log" >&2
