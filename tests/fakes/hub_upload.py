"""A delivery to the Hub in its own process, to be killed or measured: python -m tests.fakes.hub_upload EXPORT URI."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from job.errors import JobError
from job.upload.hub import HubOptions, deliver


def main(export: str, uri: str) -> int:
    """Deliver; print the commit's URL, the retries and the peak resident memory in bytes."""
    said: list[str] = []
    try:
        done = deliver(Path(export), uri, HubOptions(), report=said.append, progress=lambda _files: None)
    except JobError as error:
        print(error.line, file=sys.stderr)
        return error.exit_code
    # Not getrusage: its peak includes the parent process.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024  # type: ignore[union-attr]
    print(json.dumps({"address": done, "said": said, "peak_bytes": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
