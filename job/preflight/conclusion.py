"""Checks that combine several groups: disk, memory, time and cost."""

from __future__ import annotations

from job.data.prompts import PromptSets
from job.preflight import limit_checks
from job.preflight.checks import Check, guarded
from job.preflight.data_checks import DataFindings
from job.preflight.disk import DiskSpeed, disk_checks
from job.preflight.estimate import cost_check, time_check
from job.preflight.gradient_memory import gradient_check
from job.preflight.inputs import PreflightInputs
from job.preflight.machine_checks import MachineFindings
from job.preflight.memory_plan import MemoryPlan, Refusal, differences, memory_check, plan
from job.preflight.model_checks import ModelFindings
from job.preflight.model_facts import ModelFacts
from job.preflight.planning import Planning
from job.preflight.readings import MachineReading
from job.preflight.rental_checks import checkpoint_check, cluster_check, expected_bytes
from job.preflight.selftest import Exercise
from job.preflight.survey import Survey


def conclude(inputs: PreflightInputs, model: ModelFindings, data: DataFindings, machine: MachineFindings) -> Survey:
    """Plan memory, disk and time, if model, prompts and machine are known; return these checks alone."""
    if model.files is None or model.facts is None or data.prompts is None or machine.reading is None:
        return Survey(checks=(), allowed=tuple(inputs.settings.allow))
    files = model.files
    planning = Planning(inputs.settings, files.source, files.listing, model.facts, data.prompts, files.folder)
    speeds: dict[str, DiskSpeed] = {}
    checks: list[Check] = []
    if inputs.on is None:
        checks += guarded("disk", lambda: disk_checks(planning.needs(), speeds, inputs.settings.probe_seconds))
    reading = planning.reachable(machine.reading)
    planned = plan(model.facts, reading, planning.workload())
    if machine.exercise is not None and _computes_better_in_float32(planning, machine.exercise):
        planned, check = _in_float32(planning, reading, machine.exercise, planned)
        checks.append(check)
    checks += _memory_checks(inputs, planned, machine.reading)
    memory_plan = planned if isinstance(planned, MemoryPlan) else None
    hours = None
    if memory_plan is not None:
        descent = planning.descent(memory_plan, inputs.earlier)
        if descent is not None:
            memory_plan = memory_plan.model_copy(update={"gradient": descent})
            checks.append(gradient_check(descent, inputs.settings.search.asked_method))
        hours = planning.hours(
            memory_plan,
            reading=machine.reading,
            measured=machine.exercise,
            speeds=speeds,
            line=model.line,
            earlier=inputs.earlier,
        )
    checks += _remote_state_checks(inputs, data.prompts, model.facts)
    if hours is not None:
        settings = inputs.settings
        checks += [time_check(hours, settings.max_hours), cost_check(hours, settings.price, settings.max_cost)]
    return Survey(
        checks=tuple(checks),
        allowed=tuple(inputs.settings.allow),
        plan=memory_plan,
        hours=hours,
        offers=planning.offers(inputs.on) if inputs.on else None,
        commit=files.listing.commit,
        public=files.listing.public,
    )


def _computes_better_in_float32(planning: Planning, measured: Exercise) -> bool:
    """Return whether nothing but memory speaks against computing a model of half precision in float32."""
    loading = planning.settings.loading
    free = loading.dtypes[0] == "auto" and loading.quantization == "none" and planning.facts.quantisation is None
    return free and planning.dtype_bytes() < 4 and measured.prefers_float32


def _in_float32(
    planning: Planning, reading: MachineReading, measured: Exercise, planned: MemoryPlan | Refusal
) -> tuple[MemoryPlan | Refusal, Check]:
    """Return the plan in float32 where that fits, else the one given, and what is said of it."""
    rates = f"{measured.flops / 1e9:.3g} GFLOP/s in float32, {measured.half_flops / 1e9:.2g} in bfloat16"
    needed = "computed in the dtype that is fast on this CPU; exported in the dtype of the files"
    wide = plan(planning.facts, reading, planning.workload(4))
    if isinstance(wide, MemoryPlan):
        settings = (*wide.settings, 'loading.dtypes = ["float32"]')
        told = Check(name="model.dtype", status="ok", measured=f"float32: {rates}", needed=needed)
        return wide.model_copy(update={"dtype": "float32", "settings": settings}), told
    remedy = "the search will be slow: take a machine with more memory, or one with a GPU"
    told = Check(
        name="model.dtype",
        status="warn",
        measured=f"{rates}; in float32 it does not fit into memory",
        needed=needed,
        remedy=remedy,
    )
    return planned, told


def _memory_checks(inputs: PreflightInputs, planned: MemoryPlan | Refusal, reading: MachineReading) -> list[Check]:
    # Another machine is asked for together with the plan's settings, whatever the job's are.
    if isinstance(planned, Refusal) or inputs.on is not None:
        return [memory_check(planned)]
    loading = inputs.settings.loading
    checks = [memory_check(planned, differences(planned, loading.device_map, loading.quantization))]
    if reading.memory is not None:
        checks.append(limit_checks.ram(reading.memory, planned.host_bytes))
    return checks


def _remote_state_checks(inputs: PreflightInputs, prompts: PromptSets, facts: ModelFacts) -> list[Check]:
    settings, checks = inputs.settings, list[Check]()
    if settings.checkpoint is not None:
        held = expected_bytes(prompts, facts.layers, facts.hidden)
        checks += guarded("checkpoint", lambda: [checkpoint_check(settings, held)])
    if settings.engine == "ray" and inputs.on is None:
        checks += guarded("cluster", lambda: [cluster_check(settings.address)])
    return checks
