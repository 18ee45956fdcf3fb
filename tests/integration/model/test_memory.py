"""Memory that is kept for the next forward, and released."""

from __future__ import annotations

import json
import sys

import pytest

from job.model.memory import keep_freed_memory
from tests.helpers import run_script

# Ten times what a forward does: allocate tensors below the mmap threshold, and free them.
SCRIPT = """
import json, resource, sys, torch
from job.model.memory import keep_freed_memory, release_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def forward():
    return [torch.ones(1_000_000) for _ in range(40)]

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()
forward()
before, faults = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    forward()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
held = resident()
release_memory()
print(json.dumps({"faults": faults, "given back": held - resident()}))
"""


def measured(how: str) -> dict[str, int]:
    found: dict[str, int] = json.loads(run_script(SCRIPT, how).check().out)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other allocators")
def test_pages_are_not_made_anew_for_every_forward_and_are_given_back_when_asked() -> None:
    kept, plain = measured("kept"), measured("as it is")
    assert kept["faults"] < plain["faults"] / 3  # measured: a ninth to a sixteenth
    assert kept["given back"] > 100e6


def test_where_the_allocator_cannot_be_told_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    # A C library without mallopt is not available here.
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    keep_freed_memory()
