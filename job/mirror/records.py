"""Records of a mirror: head.json, its only mutable document, and the lease within."""

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
# A runner that lost the lease may still delete objects that were unreferenced when it last looked. So object names are
# never reused: they include contents, generation and runner.
_OBJECT = r"^[0-9a-f]{64}\.[0-9]+-[0-9a-f]{8}$"
_SHA256 = r"^[0-9a-f]{64}$"
_KIND: Literal["abliteration-job checkpoint"] = "abliteration-job checkpoint"
# Version of the head. Version 1 lacks layers and the count of trials; it is read and continued as version 2.
VERSION: Literal[2] = 2
# Mirrored files of a run folder, in the order of copying: records of completion come before their data, so a snapshot
# during a run never claims more than it holds.
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
# Names within a run folder; never `..`, hidden, or specific to a file system.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
# Folders of large files named by a cache key.
CACHES = ("directions", "residuals")
# Size limits of the head and of files, so that a mirror's host cannot fill memory. Caches are streamed to disk.
MOST_HEAD_BYTES = 16 << 20
_MOST_BYTES = 128 << 20
_MOST_OF_MANY = 2 << 30
_OF_MANY = frozenset({"study.db", "events.jsonl", "prompts.json"})  # they grow with trials and prompts
# Compression may enlarge a layer slightly; its first line lists its blocks.
_LAYER_SLACK = 2 << 20
# More layers than any writer makes; all of a file are on disk at once.
_MOST_LAYERS = 32
# Longer than the lease of any run. A forged lease cannot make a rented machine wait for days.
_LONGEST_LEASE_S = 3600.0


class MirrorError(DeliveryError):
    """A mirror is damaged, or is something else's: it is neither restored from nor written to."""


class MirroredFile(Record):
    """A mirrored file: SHA-256 and bytes of its contents, and the object that holds them."""

    sha256: str = Field(pattern=_SHA256)
    size: int = Field(ge=0)
    object: str = Field(pattern=_OBJECT)


class Layered(Record):
    """A large growing file, mirrored as layers of objects, oldest first (`job.mirror.layers`)."""

    sha256: str = Field(pattern=_SHA256)
    size: int = Field(ge=0)
    layers: tuple[MirroredFile, ...] = Field(min_length=1, max_length=_MOST_LAYERS)


class Lease(Record):
    """The right to write to a mirror.

    Attributes:
        runner: Random id of a run's start.
        namespace: PID namespace: containers on one machine share its boot id.
        beat: Counts this runner's writes to the head.
        released: The runner has ended cleanly.
        expiry_s: Seconds of silence after which another may take over.
    """

    runner: str = Field(pattern=r"^[0-9a-f]{32}$")
    host: str
    process: ProcessRecord
    namespace: str
    beat: int = 0
    released: bool = False
    expiry_s: float = Field(gt=0, le=_LONGEST_LEASE_S)

    @property
    def is_near(self) -> bool:
        """Whether this process can see the runner's process: same boot and process namespace."""
        return self.process.boot_id == this_process().boot_id and self.namespace == process_namespace()

    @property
    def is_dead(self) -> bool:
        """Whether the process has certainly ended."""
        return self.is_near and not is_alive(self.process)

    def describe(self) -> str:
        """Describe the runner in words."""
        return HolderRecord(process=self.process, host=self.host).describe()


class Head(Record):
    """head.json: the contents of a mirror, and the right to change it.

    Attributes:
        generation: Counts the snapshots.
        writer: Lineage of the run folder of the latest snapshot.
        files: The latest snapshot, by path in the run folder.
        trials: Finished trials of its study; None in version 1.
        previous: Unreferenced objects of the previous snapshot, which may still be read.
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
        """The distinct objects of the latest snapshot."""
        return objects_of(self.files)

    @property
    def size(self) -> int:
        """Bytes of the latest snapshot."""
        return sum(entry.size for entry in self.objects.values())

    def encode(self) -> bytes:
        """Serialise to JSON."""
        return (self.model_dump_json(indent=1) + "\n").encode()


class Lineage(Record):
    """mirror.json in a run folder: its own id, and the latest generation that it has seen or begun to write."""

    version: Literal[1] = 1
    folder: str
    generation: int


def objects_of(files: Mapping[str, MirroredFile | Layered]) -> dict[str, MirroredFile]:
    """Return the distinct objects of files."""
    entries: list[MirroredFile] = []
    for file in files.values():
        entries += file.layers if isinstance(file, Layered) else (file,)
    return {entry.object: entry for entry in entries}


def decode_head(data: bytes, job: str, where: str) -> Head:
    """Parse a head. Raises MirrorError if it is damaged, another job's, or no head."""
    torn = f"the checkpoint {where} is inconsistent: {job}/{HEAD} "
    try:
        read = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MirrorError(torn + "cannot be read", remedy=_REMEDY) from error
    if not isinstance(read, dict) or read.get("kind") != _KIND:
        raise MirrorError(f"{where} holds something else: {job}/{HEAD} is not from a checkpoint", remedy=_ELSEWHERE)
    if read.get("version") not in (1, VERSION):
        raise MirrorError(
            f"the checkpoint {where} was made by another version of this program ({read.get('package')})",
            remedy="use that version, or another --checkpoint",
        )
    try:
        head = Head.model_validate(read)
    except ValidationError as error:
        raise MirrorError(torn + f"is incomplete: {_first(error)}", remedy=_REMEDY) from error
    if head.job_id != job:
        raise MirrorError(f"{where}: {job}/{HEAD} belongs to job {head.job_id}", remedy=_ELSEWHERE)
    if not JOB_ID.fullmatch(job) or job_id(head.identity) != job:
        raise MirrorError(f"{where}: {job}/{HEAD} belongs to another job than its path says", remedy=_ELSEWHERE)
    if odd := [path for path in head.files if not is_mirrored(path)]:
        raise MirrorError(f"{where} holds something else: {job}/{HEAD} names {odd[0]!r}", remedy=_ELSEWHERE)
    if large := [line for path, entry in head.files.items() if (line := excess(path, entry))]:
        raise MirrorError(torn + f"names {large[0]}", remedy=_REMEDY)
    return head


def excess(path: str, entry: MirroredFile | Layered) -> str:
    """Return why a file is too large for a mirror, or ""."""
    if Path(path).parts[0] in CACHES:
        return ""
    most = _MOST_OF_MANY if path in _OF_MANY else _MOST_BYTES
    layers = entry.layers if isinstance(entry, Layered) else ()
    allowed = entry.size + entry.size // 64 + _LAYER_SLACK
    if entry.size <= most and all(layer.size <= allowed for layer in layers):
        return ""
    size = max(entry.size, *(layer.size for layer in layers), 0)
    return f"{size / 2**20:.0f} MiB for {path}, which may have at most {min(most, allowed) / 2**20:.0f}"


_REMEDY = "move it away and start from the workspace, or name another --checkpoint"
_ELSEWHERE = "name another --checkpoint, or move it away"


def torn(where: str, job: str, what: str) -> MirrorError:
    """Return the error for a mirror that lacks an object of its head."""
    return MirrorError(f"the checkpoint {where} of job {job} is inconsistent: {what}", remedy=_REMEDY)


def oversized_head(where: str, job: str) -> MirrorError:
    """Return the error for a head above the size limit."""
    return torn(where, job, f"{HEAD} has more than {MOST_HEAD_BYTES >> 20} MiB")


def foreign(where: str, job: str, names: list[str]) -> MirrorError:
    """Return the error for a place that holds something else."""
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return MirrorError(f"{where} holds something else under {job}/: {shown}", remedy=_ELSEWHERE)


def is_mirrored(path: str) -> bool:
    """Return whether mirrors hold a path of a run folder; paths outside it are not."""
    first, *rest = path.split("/")
    if first not in MIRRORED or (rest and first in _FILES):
        return False
    return all(_PART.fullmatch(part) for part in (first, *rest))


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
