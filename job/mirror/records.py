"""What a mirror says of itself: head.json, the one document that ever changes, and the lease in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from job.errors import DeliveryError
from job.records import Record
from job.storage.identity import job_id
from job.storage.run_folder import JOB_ID
from job.system.processes import HolderRecord, ProcessRecord, is_alive, process_namespace, this_process

# Names under JOB_ID/ of a mirror.
HEAD, OBJECTS = "head.json", "objects"
# A runner that has lost the lease may still be about to delete what nothing named when it last looked. So the names of
# objects are never used again: contents, generation and runner are in them.
_OBJECT = r"^[0-9a-f]{64}\.[0-9]+-[0-9a-f]{8}$"
_SHA256 = r"^[0-9a-f]{64}$"
_KIND: Literal["abliteration-job checkpoint"] = "abliteration-job checkpoint"
# Of the head. Version 1 has neither layers nor a count of trials; it is read and gone on with, as version 2.
VERSION: Literal[2] = 2
# What a run folder holds that a mirror holds, too. In this order it is copied: what says that something is done comes
# before what it was done with, so that no snapshot, taken while the run goes on, claims more than it holds.
MIRRORED = (
    "state.json",
    "meter.json",
    "uploads.json",
    "uploads",
    "figures",
    "report.md",
    "report.html",
    "study.db",
    "events.jsonl",
    "directions",
    "residuals",
    "preflight.json",
    "prompts.json",
    "reproduces.json",
    "job.json",
)
STUDY, LINEAGE = "study.db", "mirror.json"
_FILES = frozenset(name for name in MIRRORED if "." in name)
# Names within a run folder; none is `..`, hidden, or of another file system's making.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
# Folders of large files that are named by a key over all that changes them.
CACHES = ("directions", "residuals")
# What a head may have, and each kind of file: a mirror's host must not fill memory. Caches are streamed to the disk.
MOST_HEAD_BYTES = 16 << 20
_MOST_BYTES = 128 << 20
_MOST_OF_MANY = 2 << 30
_OF_MANY = frozenset({"study.db", "events.jsonl", "prompts.json"})  # they grow with trials and prompts
# A layer is compressed, which may make it somewhat larger than what it holds; its first line says which blocks it has.
_LAYER_SLACK = 2 << 20


class MirrorError(DeliveryError):
    """A mirror is torn, or is something else's: nothing is restored from it and nothing written to it."""


class MirroredFile(Record):
    """A file of the run folder as the mirror holds it.

    Attributes:
        sha256: Of its contents.
        size: Bytes.
        object: The object that holds the contents.
    """

    sha256: str = Field(pattern=_SHA256)
    size: int = Field(ge=0)
    object: str = Field(pattern=_OBJECT)


class Layered(Record):
    """A large file that grows: its contents are spread over objects, the oldest first.

    Attributes:
        sha256: Of its contents.
        size: Bytes.
        layers: What to write over each other, as `job.mirror.layers` makes it.
    """

    sha256: str = Field(pattern=_SHA256)
    size: int = Field(ge=0)
    layers: tuple[MirroredFile, ...] = Field(min_length=1)


class Lease(Record):
    """Who may write to a mirror.

    Attributes:
        runner: Made up at each start of a run.
        host: The machine's name, for people.
        process: The process.
        namespace: Within which that process's id has a meaning: containers on one machine share its boot.
        beat: Counts all that this runner has written to the head.
        released: It has ended and left word.
        expiry_s: Seconds of silence after which another may take over.
    """

    runner: str = Field(pattern=r"^[0-9a-f]{32}$")
    host: str
    process: ProcessRecord
    namespace: str
    beat: int = 0
    released: bool = False
    expiry_s: float = Field(gt=0)

    @property
    def is_near(self) -> bool:
        """Whether the process is one that can be looked for from here."""
        return self.process.boot_id == this_process().boot_id and self.namespace == process_namespace()

    @property
    def is_dead(self) -> bool:
        """Whether it is certain that the process has ended."""
        return self.is_near and not is_alive(self.process)

    def describe(self) -> str:
        """Return in words who it is."""
        return HolderRecord(process=self.process, host=self.host).describe()


class Head(Record):
    """head.json: what a mirror holds, and whose turn it is to change it.

    Attributes:
        kind: That this is such a document.
        version: Version of this format.
        package: Version of this package that made it.
        job_id: The job.
        identity: What the job is, as in job.json.
        generation: Counts the snapshots.
        lease: Who may write.
        writer: The run folder that the latest snapshot was taken of.
        files: The latest snapshot, by paths in the run folder.
        trials: Finished trials of the latest snapshot's study; None: not counted, as by version 1.
        previous: Objects of the snapshot before that this one does not name: readers may still be at them.
    """

    kind: Literal["abliteration-job checkpoint"] = _KIND
    version: Literal[1, 2] = VERSION
    package: str
    job_id: str
    identity: dict[str, Any]
    generation: int = Field(ge=0)
    lease: Lease
    writer: str
    files: dict[str, MirroredFile | Layered]
    trials: int | None = None
    previous: tuple[Annotated[str, Field(pattern=_OBJECT)], ...] = ()

    @property
    def objects(self) -> dict[str, MirroredFile]:
        """The objects of the latest snapshot, each once."""
        return objects_of(self.files)

    @property
    def size(self) -> int:
        """Bytes of the latest snapshot."""
        return sum(entry.size for entry in self.objects.values())

    def encode(self) -> bytes:
        """Return its bytes."""
        return (self.model_dump_json(indent=1) + "\n").encode()


class Lineage(Record):
    """mirror.json in a run folder: which snapshots of the mirror were taken of this very folder.

    Attributes:
        folder: Made up when the folder was first mirrored or restored.
        generation: The latest snapshot that this folder has seen or has been about to write.
    """

    version: Literal[1] = 1
    folder: str
    generation: int


def objects_of(files: Mapping[str, MirroredFile | Layered]) -> dict[str, MirroredFile]:
    """Return the objects that hold the contents of files, each once."""
    entries: list[MirroredFile] = []
    for file in files.values():
        entries += file.layers if isinstance(file, Layered) else (file,)
    return {entry.object: entry for entry in entries}


def decode_head(data: bytes, job: str, where: str) -> Head:
    """Return a head.

    Raises:
        MirrorError: It is torn, another job's, or no head at all.
    """
    torn = f"the checkpoint {where} is torn: {job}/{HEAD} "
    try:
        read = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MirrorError(torn + "cannot be read", remedy=_REMEDY) from error
    if not isinstance(read, dict) or read.get("kind") != _KIND:
        raise MirrorError(f"{where} holds something else: {job}/{HEAD} is no checkpoint's", remedy=_ELSEWHERE)
    if read.get("version") not in (1, VERSION):
        raise MirrorError(
            f"the checkpoint {where} was made by another version of this program ({read.get('package')})",
            remedy="use that version, or another --checkpoint",
        )
    try:
        head = Head.model_validate(read)
    except ValidationError as error:
        raise MirrorError(torn + f"is not whole: {_first(error)}", remedy=_REMEDY) from error
    if head.job_id != job:
        raise MirrorError(f"{where}: {job}/{HEAD} belongs to job {head.job_id}", remedy=_ELSEWHERE)
    if not JOB_ID.fullmatch(job) or job_id(head.identity) != job:
        raise MirrorError(f"{where}: {job}/{HEAD} is of another job than its name says", remedy=_ELSEWHERE)
    if odd := [path for path in head.files if not is_mirrored(path)]:
        raise MirrorError(f"{where} holds something else: {job}/{HEAD} names {odd[0]!r}", remedy=_ELSEWHERE)
    if large := [line for path, entry in head.files.items() if (line := excess(path, entry))]:
        raise MirrorError(torn + f"names {large[0]}", remedy=_REMEDY)
    return head


def excess(path: str, entry: MirroredFile | Layered) -> str:
    """Return that a file is larger than a mirror takes, "" if it is not."""
    if Path(path).parts[0] in CACHES:
        return ""
    most = _MOST_OF_MANY if path in _OF_MANY else _MOST_BYTES
    layers = entry.layers if isinstance(entry, Layered) else ()
    allowed = entry.size + entry.size // 64 + _LAYER_SLACK
    if entry.size <= most and all(layer.size <= allowed for layer in layers):
        return ""
    size = max(entry.size, *(layer.size for layer in layers), 0)
    return f"{size / 2**20:.0f} MiB for {path}, which may have {min(most, allowed) / 2**20:.0f}"


_REMEDY = "move it away and start from the workspace, or name another --checkpoint"
_ELSEWHERE = "name another --checkpoint, or move it away"


def torn(where: str, job: str, what: str) -> MirrorError:
    """Return the error for a mirror that lacks what its head names."""
    return MirrorError(f"the checkpoint {where} of job {job} is torn: {what}", remedy=_REMEDY)


def oversized_head(where: str, job: str) -> MirrorError:
    """Return the error for a head that is larger than any that this program writes."""
    return torn(where, job, f"{HEAD} has more than {MOST_HEAD_BYTES >> 20} MiB")


def foreign(where: str, job: str, names: list[str]) -> MirrorError:
    """Return the error for a place that holds something else."""
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return MirrorError(f"{where} holds something else under {job}/: {shown}", remedy=_ELSEWHERE)


def is_mirrored(path: str) -> bool:
    """Return whether a path in a run folder is one that mirrors hold; paths out of it are not."""
    first, *rest = path.split("/")
    if first not in MIRRORED or (rest and first in _FILES):
        return False
    return all(_PART.fullmatch(part) for part in (first, *rest))


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
