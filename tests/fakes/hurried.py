"""A clock for libraries whose waits between tries cannot be set: a second takes a hundredth of one."""

from __future__ import annotations

import time
from types import SimpleNamespace

# botocore waits up to 15 s, by chance, before it gives a request up. For `botocore.endpoint.time`, which only sleeps.
CLOCK = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 100))
