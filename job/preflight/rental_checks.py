"""The checks of what outlives this machine: the checkpoint, and the end of the rental."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.config.schema import Settings
from job.data.prompts import PromptSets
from job.errors import MachineError
from job.preflight.checks import Check, size
from job.preflight.fencing import proven
from job.preflight.mounts import outlives_machine
from job.transfer.folders import target_folder
from job.upload.targets import s3_options

if TYPE_CHECKING:
    from job.cloud.self_stop import Rental

_NEEDED = "a place off this machine for what must survive it"


def expected_bytes(prompts: PromptSets, layers: int, width: int) -> int:
    """Return about how many bytes the checkpoint will hold."""
    from job.mirror import expected_bytes as of_mirror

    sets = (prompts.good, prompts.bad, prompts.helpfulness, prompts.unhelpfulness, prompts.capability)
    return of_mirror(sum(map(len, sets)), layers + 1, width)


def checkpoint_check(settings: Settings, held: int) -> Check:
    """Prove that the checkpoint can be kept, and leave nothing there.

    Args:
        settings: Where it is.
        held: Bytes that it will hold.

    Raises:
        JobError: It cannot.
    """
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
        needed="the right to write there, and writes that fail where another run was quicker",
        remedy="" if proof.fenced else "make sure yourself that no two runs of this job go on at once",
    )


def cluster_check(address: str | None) -> Check:
    """Prove that Ray is installed, and that something answers at a cluster's address.

    Args:
        address: HOST:PORT, auto, or None where a cluster is started.

    Raises:
        UsageError: Ray is not installed.
        MachineError: Nothing answers.
    """
    from job.workers.ray_engine import reached_cluster

    return Check(name="cluster", status="ok", measured=reached_cluster(address), needed="a Ray cluster to compute on")


def lease_check(settings: Settings, job: str) -> Check:
    """Say whether another run holds the job's lease at the checkpoint.

    Args:
        settings: Where the checkpoint is.
        job: The job's name.

    Raises:
        JobError: The checkpoint cannot be reached, or is torn.
    """
    from job.mirror import MirrorOptions, open_mirror

    assert settings.checkpoint is not None
    with open_mirror(settings.checkpoint, MirrorOptions(s3=s3_options(settings))) as mirror:
        holder = mirror.holder(job)
    return Check(
        name="job.lease",
        status="fail" if holder else "ok",
        measured=f"held by {holder}" if holder else "nobody holds this job at its checkpoint",
        needed="no other run of this job",
        remedy="wait for it to end or stop it" if holder else "",
    )


def rental_checks(settings: Settings, rental: Rental | None, undelivered: str = "") -> list[Check]:
    """Return the checks of the rented machine, none where there is none and nothing is to become of it.

    Args:
        settings: What is to become of it.
        rental: The machine.
        undelivered: Which other job of the workspace is not delivered, "" if there is none.
    """
    checks = []
    ends = settings.when_done != "nothing" or settings.when_failed != "nothing"
    if ends:
        checks.append(_known(rental))
    if ends and undelivered:
        checks.append(
            Check(
                name="rental.others",
                status="warn",
                measured=f"{undelivered}: this machine will NOT be ended and bills on",
                needed="no other job in the workspace that is not delivered",
                remedy="deliver that job first (`abliterate resume --job ID --upload URI`), move its folder away, or "
                "give this one another --workspace",
            )
        )
    if settings.when_done == "destroy" or settings.when_failed == "destroy":
        checks.append(_survival(settings))
    if rental is not None and settings.checkpoint is None:
        checks.append(
            Check(
                name="rental.checkpoint",
                status="warn",
                measured=f"this machine is rented ({rental.platform}) and the job has no checkpoint: if the machine is "
                "taken away, all is lost",
                needed="--checkpoint s3://bucket/prefix or hf://user/repo",
                remedy="give --checkpoint",
            )
        )
    return checks


def _known(rental: Rental | None) -> Check:
    """Say whether the platform can be asked to end the rental of this machine."""
    try:
        if rental is None:
            raise MachineError(
                "this is no rented machine that is known: nothing would end it",
                remedy="leave --when-done and --when-failed out, or pass the platform's variables into the container",
            )
        found = rental.check()
    except MachineError as error:
        return Check(
            name="rental.end",
            status="fail",
            measured=str(error),
            needed="a platform that ends the rental when asked",
            remedy=error.remedy,
        )
    return Check(name="rental.end", status="ok", measured=found, needed="a platform that ends the rental when asked")


def _survival(settings: Settings) -> Check:
    """Say whether what must survive the machine has a place off it."""
    result = [target for target in settings.upload if outlives_machine(target)]
    rest = settings.checkpoint is not None and outlives_machine(settings.checkpoint)
    missing = [
        *([] if result else ["the result (give --upload hf://... or s3://...)"]),
        *([] if rest else ["study, directions, events and report (give --checkpoint s3://... or hf://...)"]),
    ]
    return Check(
        name="rental.survival",
        status="fail" if missing else "ok",
        measured=f"to be destroyed with this machine: {' and '.join(missing)}" if missing else "all that matters",
        needed=_NEEDED,
        remedy="name such places, or use --when-done stop" if missing else "",
        scope="job",
    )
