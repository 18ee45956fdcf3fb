"""Find live processes of earlier runs, distinguished from reused ids. Nothing is killed."""

from __future__ import annotations

import os
from collections.abc import Iterable

from job.preflight.checks import Check
from job.preflight.readings import MachineReading
from job.system.processes import ProcessRecord, is_alive


def own_leftovers(records: Iterable[ProcessRecord], reading: MachineReading) -> Check:
    """Report live processes of this job's earlier runs, and their GPUs."""
    living = [record for record in records if record.pid != os.getpid() and is_alive(record)]
    held = {holder.pid: gpu.index for gpu in reading.gpus for holder in gpu.holders}
    shown = [
        f"process {record.pid}" + (f" on GPU {held[record.pid]}" if record.pid in held else "") for record in living
    ]
    numbers = " ".join(str(record.pid) for record in living)
    return Check(
        name="strays.own",
        status="fail" if living else "ok",
        measured=f"an earlier run is still alive: {', '.join(shown)}" if living else "no earlier run is alive",
        needed="no other run of this job on this machine",
        remedy=f"wait for it, or stop it: kill {numbers} (it then saves its state and exits 75)" if living else "",
    )
