"""An upload in its own process, to be killed or measured: python -m tests.fakes.s3_upload EXPORT URI STATE OPTIONS."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import botocore.endpoint

from job.errors import JobError, Stopped
from job.system.signals import StopSignals
from job.transfer.s3 import S3Options
from job.upload.s3 import deliver
from tests.fakes.hurried import CLOCK


def main(export: str, uri: str, state: str, options: str) -> int:
    """Deliver; print the result and the peak resident memory in bytes."""
    botocore.endpoint.time = CLOCK  # type: ignore[attr-defined]
    try:
        with StopSignals().installed():
            done = deliver(Path(export), uri, Path(state), S3Options(**json.loads(options)))
    except JobError as error:
        print(error.line, file=sys.stderr)
        return error.exit_code
    except Stopped:
        return Stopped.exit_code
    # Not getrusage: its peak includes the parent process.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024  # type: ignore[union-attr]
    print(json.dumps({**vars(done), "peak_bytes": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
