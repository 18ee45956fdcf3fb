"""Checks of the machine: GPUs, processes, memory and limits."""

from __future__ import annotations

import os
from dataclasses import dataclass

from job.preflight import limit_checks
from job.preflight.checks import Check, attempt
from job.preflight.gpu import gpu_checks
from job.preflight.gpu import holders as holders_check
from job.preflight.inputs import PreflightInputs
from job.preflight.limits import read_limits
from job.preflight.machine import read_machine
from job.preflight.readings import MachineReading
from job.preflight.selftest import RATE_SECONDS, Exercise, compute_check, exercise
from job.preflight.strays import own_leftovers


@dataclass(frozen=True)
class MachineFindings:
    """Findings on the machine; `exercise` is the device's speed, None if unusable or on another machine."""

    checks: tuple[Check, ...]
    reading: MachineReading | None = None
    exercise: Exercise | None = None


def examine_machine(inputs: PreflightInputs) -> MachineFindings:
    """Read and exercise this machine; judge another one by its reading only."""
    if inputs.on is not None:
        return MachineFindings(tuple(gpu_checks(inputs.on) if inputs.on.gpus else ()), inputs.on)
    reading = wait_for_gpus(inputs)
    device = inputs.settings.loading.device
    if device == "auto":
        device = "cuda:0" if reading.gpus else "cpu"
    seconds = min(RATE_SECONDS, inputs.settings.probe_seconds)
    measured = attempt("machine", lambda: exercise(device, seconds=seconds))
    if isinstance(measured, Check):
        return MachineFindings((measured,), reading)
    checks = [compute_check(measured), own_leftovers(inputs.earlier.processes, reading)]
    if device.startswith("cuda"):
        checks += gpu_checks(reading)
    return MachineFindings((*checks, *_limit_checks(reading)), reading, measured)


def _limit_checks(reading: MachineReading) -> list[Check]:
    assert reading.memory is not None
    assert reading.cpus is not None
    return [
        limit_checks.shared_memory(reading.memory),
        limit_checks.threads(reading.cpus, os.environ),
        limit_checks.cpu_quota(reading.cpus, os.environ),
        limit_checks.open_files(read_limits()),
    ]


def wait_for_gpus(inputs: PreflightInputs) -> MachineReading:
    """Read this machine once its GPUs are free, or after `wait_for_gpu` minutes."""
    deadline = inputs.clock() + 60 * inputs.settings.wait_for_gpu
    while True:
        reading = read_machine(torch_architectures=True)
        taken = any(holders_check(gpu).status != "ok" for gpu in reading.gpus)
        if not taken or inputs.clock() >= deadline:
            return reading
        inputs.report("waiting until other processes free the memory of the GPUs")
        inputs.sleep(min(10.0, max(deadline - inputs.clock(), 0.0)))
