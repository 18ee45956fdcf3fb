"""Preflight as a stage of a run: records its findings, and pins what it resolved."""

from __future__ import annotations

from typing import Any

from job.data.prompts import PromptSets
from job.errors import ImpossibleJobError
from job.export.reproduction import require_same_prompts
from job.lifecycle.running import RunningJob
from job.mirror.vetting import note_known_code
from job.preflight.checks import is_allowed
from job.preflight.inputs import PreflightInputs
from job.preflight.runner import preflight
from job.preflight.survey import Survey
from job.report.console import plan_lines
from job.stages.reproduce import original_of
from job.storage.atomic import write_record


def checked_prompts(job: RunningJob, inputs: PreflightInputs) -> PromptSets:
    """Run all checks, then return the pinned prompts. Raises ImpossibleJobError or MachineError."""
    result = preflight(inputs)
    survey, prompts = result.survey, result.prompts
    write_record(job.folder.preflight_file, survey)
    for check in survey.checks:
        if check.status != "ok":
            allowed = " (allowed)" if is_allowed(check, survey.allowed) else ""
            job.events.say(f"preflight: {check.status}{allowed}: {check.line}")
    job.events.emit("preflight", f"preflight: {survey.summary}", checks=[c.model_dump() for c in survey.checks])
    survey.require()
    if prompts is None:
        raise ImpossibleJobError(
            "the prompts cannot be read, which --allow cannot override", remedy="see `abliterate preflight`"
        )
    original = original_of(job)
    if original is not None:
        require_same_prompts(original, prompts)
    if not job.folder.prompts_file.exists():
        write_record(job.folder.prompts_file, prompts)
        job.events.emit("prompts", received=prompts.received, commits=prompts.commits)
        for check in survey.checks:
            if check.name.startswith("data."):
                job.events.say(f"{check.name.removeprefix('data.')}: {check.measured}")
    _pin(job, survey)
    if job.record.searches:
        done = inputs.earlier.trials_done
        for line in plan_lines(survey.model_dump(mode="json"), job.settings.model, job.trials_wanted, done):
            job.events.emit("plan", line)
    return prompts


def _pin(job: RunningJob, survey: Survey) -> None:
    pinned: dict[str, Any] = {}
    if job.record.model_commit is None and survey.commit is not None:
        pinned |= {"model_commit": survey.commit, "model_public": survey.public}
    if job.record.planned_rows is None and survey.plan is not None:
        pinned["planned_rows"] = survey.plan.rows
        pinned["planned_dtype"] = survey.plan.dtype
        pinned["planned_weights"] = {device.device: device.weights for device in survey.plan.devices}
    if pinned:
        job.file.pin(**pinned)
        note_known_code(job.folder, job.record, job.settings)
