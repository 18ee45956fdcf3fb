"""Checks of what outlives this machine: checkpoint, cluster and end of the rental."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from job.config.schema import Settings
from job.data.prompts import PromptSets
from job.errors import MachineError, UsageError
from job.preflight.checks import Check, size
from job.preflight.fencing import proven
from job.preflight.mounts import outlives_machine
from job.transfer.folders import target_folder
from job.upload.targets import s3_options

if TYPE_CHECKING:
    from job.cloud.self_stop import Rental

_NEEDED = "a place off this machine for all that must survive"


def expected_bytes(prompts: PromptSets, layers: int, width: int) -> int:
    """Estimate the checkpoint's size in bytes."""
    from job.mirror import expected_bytes as of_mirror

    sets = (prompts.good, prompts.bad, prompts.helpfulness, prompts.unhelpfulness, prompts.capability)
    return of_mirror(sum(map(len, sets)), layers + 1, width)


def checkpoint_check(settings: Settings, held: int) -> Check:
    """Prove that the checkpoint can be stored, leaving nothing there; `held` is its size in bytes. Raises JobError."""
    from job.mirror import HOLDS, MirrorOptions, open_mirror, scheme_of

    assert settings.checkpoint is not None
    with open_mirror(settings.checkpoint, MirrorOptions(s3=s3_options(settings))) as mirror:
        proof = mirror.probe()
    if scheme_of(settings.checkpoint) == "file":
        proof = proven(proof, target_folder(settings.checkpoint))
    quirks = "".join(f"; {quirk}" for quirk in proof.quirks)
    return Check(
        name="checkpoint",
        status="ok" if proof.fenced else "warn",
        measured=f"{settings.checkpoint}: {proof.what}{quirks}; it will hold about {size(held)}: {HOLDS}",
        needed="permission to write, and writes that fail if another run wrote first",
        remedy="" if proof.fenced else "make sure that no two runs of this job run at the same time",
    )


def cluster_check(address: str | None) -> Check:
    """Prove that Ray is installed and a cluster answers (None: is started). Raises UsageError or MachineError."""
    return Check(name="cluster", status="ok", measured=_reached_cluster(address), needed="a Ray cluster")


def _reached_cluster(given: str | None) -> str:
    from job.workers.ray_engine import GONE_SECONDS, cluster_address, ray_module

    address = cluster_address(given)
    ray = f"Ray {ray_module().__version__}"
    if address is None:
        return f"{ray}, to be started on this machine"
    if address == "auto":
        return f"{ray}, the cluster of this machine"
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"{address!r} is not the address of a Ray cluster", remedy="give HOST:PORT, or auto")
    try:
        with socket.create_connection((host, int(port)), timeout=GONE_SECONDS):
            return f"{ray}, a cluster that answers at {address}"
    except OSError as error:
        raise MachineError(
            f"no Ray cluster answers at {address}: {error}", remedy="start the cluster, or correct the address"
        ) from error


def lease_check(settings: Settings, job: str) -> Check:
    """Report whether another run holds the job's lease. Raises JobError if the checkpoint fails."""
    from job.mirror import MirrorOptions, open_mirror

    assert settings.checkpoint is not None
    with open_mirror(settings.checkpoint, MirrorOptions(s3=s3_options(settings))) as mirror:
        holder = mirror.holder(job)
    return Check(
        name="job.lease",
        status="fail" if holder else "ok",
        measured=f"held by {holder}" if holder else "no run holds this job at its checkpoint",
        needed="no other run of this job",
        remedy="wait for it to end or stop it" if holder else "",
    )


def rental_checks(settings: Settings, rental: Rental | None, undelivered: str = "") -> list[Check]:
    """Return the checks of a rented machine, [] without one if no end is requested."""
    checks = []
    ends = settings.when_done != "nothing" or settings.when_failed != "nothing"
    if ends:
        checks.append(_end_check(rental))
    if ends and undelivered:
        checks.append(
            Check(
                name="rental.others",
                status="warn",
                measured=f"{undelivered}: this machine will NOT be ended and BILLS ON",
                needed="no other undelivered job in the workspace",
                remedy="deliver that job first (`abliterate resume --job ID --upload URI`), move its folder away, or "
                "give this one another --workspace",
            )
        )
    if settings.when_done == "destroy" or settings.when_failed == "destroy":
        checks.append(_survival_check(settings))
    if rental is not None and settings.checkpoint is None:
        checks.append(
            Check(
                name="rental.checkpoint",
                status="warn",
                measured=f"this machine is rented ({rental.platform}) without a checkpoint: everything is lost "
                "if the platform takes the machine away",
                needed="--checkpoint s3://bucket/prefix or hf://user/repo",
                remedy="give --checkpoint",
            )
        )
    return checks


def _end_check(rental: Rental | None) -> Check:
    try:
        if rental is None:
            raise MachineError(
                "this machine is not a known rental: nothing would end it",
                remedy="leave out --when-done and --when-failed, or pass the platform's variables into the container",
            )
        found = rental.check()
    except MachineError as error:
        return Check(
            name="rental.end",
            status="fail",
            measured=str(error),
            needed="a platform whose API ends the rental",
            remedy=error.remedy,
        )
    return Check(name="rental.end", status="ok", measured=found, needed="a platform whose API ends the rental")


def _survival_check(settings: Settings) -> Check:
    result = [target for target in settings.upload if outlives_machine(target)]
    rest = settings.checkpoint is not None and outlives_machine(settings.checkpoint)
    missing = [
        *([] if result else ["the result (give --upload hf://... or s3://...)"]),
        *([] if rest else ["study, directions, events and report (give --checkpoint s3://... or hf://...)"]),
    ]
    return Check(
        name="rental.survival",
        status="fail" if missing else "ok",
        measured=f"lost when this machine is destroyed: {' and '.join(missing)}"
        if missing
        else "result, study and report",
        needed=_NEEDED,
        remedy="give these options, or use --when-done stop" if missing else "",
        scope="job",
    )
