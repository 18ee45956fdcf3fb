"""Checks of settings, lock, lease and past starts."""

from __future__ import annotations

from job.preflight.checks import Check, guarded
from job.preflight.inputs import JobHolder, PreflightInputs
from job.preflight.rental_checks import lease_check
from job.preflight.restarts import restart_check


def settings_checks(inputs: PreflightInputs) -> list[Check]:
    """Return a warning for each renamed or ineffective setting."""
    checks = [
        Check(
            name="settings.old",
            status="warn",
            measured=note,
            needed="current names of settings",
            remedy="rename or remove it",
        )
        for note in inputs.notes
    ]
    directions = inputs.settings.directions
    if directions.orthogonalize_direction and directions.method == "probe":
        checks.append(
            Check(
                name="settings.directions",
                status="warn",
                measured="directions.orthogonalize_direction has no effect on the probe",
                needed="settings that have an effect",
                remedy="use it with mean-difference or contrastive-pca",
            )
        )
    return checks or [Check(name="settings", status="ok", measured="valid", needed="settings that go together")]


def job_checks(inputs: PreflightInputs) -> list[Check]:
    """Return the checks of lock, restarts and lease; none for another machine."""
    if inputs.on is not None:
        return []
    checks = [_lock_check(inputs.holder), restart_check(inputs.earlier.starts, inputs.settings_key)]
    lease = inputs.lease
    if lease is not None:
        checks += guarded("job.lease", lambda: [lease_check(inputs.settings, lease)])
    return checks


def _lock_check(holder: JobHolder | None) -> Check:
    return Check(
        name="job.lock",
        status="fail" if holder else "ok",
        measured=f"held by {holder.name}" if holder else "no other run holds this job",
        needed="no other run of this job",
        remedy=holder.remedy if holder else "",
    )
