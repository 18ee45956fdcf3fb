"""The run folder: one folder a job under the workspace, written atomically, held by one run at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from job.config.schema import ENDS, REFERENCE_SETS, Settings
from job.data.sources import source_identity
from job.errors import HeldError, JobError, MachineError, UsageError
from job.model.files import no_model_folder, parse_model, refuse_links_out
from job.records import ExportFormat, JobRecord, Record, State, Upload
from job.system.failpoints import reached
from job.system.locks import Lock, LockedError, is_locked
from job.system.processes import HolderRecord, this_process
from job.text.redaction import redact, redacted, redacted_json

# Settings that only extend a job or say where things go; all others are part of its identity.
EXTENDING = frozenset(
    {
        "workspace",
        "checkpoint",
        "require_checkpoint",
        "when_done",
        "when_failed",
        "upload",
        "visibility",
        "export_format",
        "max_kl",
        "max_refusals",
        "card",
        "hub",
        "s3",
        "trials",
        "tune",
        "allow",
        "price",
        "max_hours",
        "max_cost",
        "grace",
        "hang_seconds",
        "study_storage",
        "workers",
        "database",
        "wait_for_gpu",
        "probe_seconds",
    }
)
# Likewise, of settings that are otherwise part of it.
EXTENDING_WITHIN = {"scoring": frozenset({"detectors", "nli_model"})}
# Names of jobs: they come from folders and checkpoints, and go into paths.
JOB_ID = re.compile(r"[0-9a-f]{12}")
PACKAGES = ("abliteration-job", "torch", "transformers", "optuna", "safetensors", "tokenizers")
# A status command holds the lock for an instant to see whether a run does.
_LOCK_SECONDS = 2.0
_BLOCK = 1 << 20
# What fsync of a folder answers where the file system has none.
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
MEMO = ".hashes.json"
# Of what only the owner may read.
PRIVATE = 0o600
# Files of an export beside the model's own; the mark is written last and holds the manifest's hash.
CARD, REPRODUCE, SUMS, MANIFEST, DONE = "README.md", "reproduce.json", "SHA256SUMS", "manifest.json", ".done"

R = TypeVar("R", bound=Record)


def write_atomically(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Replace a file's contents so that a crash leaves the old ones or the new ones, never a mixture.

    Args:
        path: The file.
        data: Its new contents.
        mode: Its permissions; None: the usual ones.

    Raises:
        MachineError: The file cannot be written here.
    """
    # Not by the process id: in two containers that share a disk both may be process 1.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        reached(f"written:{path.name}")  # the next point finds what is there after the next line
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable, as far as its file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems sync files alone. A file that cannot be synced stays an error.
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_file(file: Path) -> None:
    """Make a file's contents durable."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def sync_tree(folder: Path) -> None:
    """Make a folder and all that is in it durable: before it is renamed to where it counts."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            sync_file(path)
    sync_folder(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it where they are missing, and make that durable.

    Raises:
        OSError: It cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def cannot_write(path: Path, error: OSError) -> MachineError:
    """Return the error for a file or folder that this machine does not let us write."""
    return MachineError(
        f"cannot write {path}: {error.strerror or error}",
        remedy="free disk space, correct its permissions or choose another --workspace",
    )


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_record(path: Path, record: Record, *, mode: int | None = None) -> None:
    """Write a record as JSON, atomically, with these permissions or the usual ones."""
    write_atomically(path, (record.model_dump_json(indent=2) + "\n").encode(), mode=mode)


def read_record(path: Path, kind: type[R]) -> R:
    """Read a record back.

    Raises:
        JobError: The file does not hold such a record.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise JobError(
            f"{path} cannot be read: {str(error).splitlines()[0]}",
            remedy="restore it, or start the job again with another --workspace",
        ) from error


def is_sealed(export: Path) -> bool:
    """Return whether an export is complete."""
    mark, manifest = export / DONE, export / MANIFEST
    return mark.is_file() and manifest.is_file() and mark.read_text().strip() == sha256_file(manifest)


class RunFolder:
    """Paths and records of one job's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job_file = path / "job.json"
        self.state_file = path / "state.json"
        self.stacks_file = path / "stacks.txt"
        self.meter_file = path / "meter.json"
        self.study_file = path / "study.db"
        self.events_file = path / "events.jsonl"
        self.preflight_file = path / "preflight.json"
        self.holder_file = path / "holder.json"
        self.uploads_file = path / "uploads.json"
        self.uploads_state = path / "uploads"
        self.prompts_file = path / "prompts.json"
        self.reproduces_file = path / "reproduces.json"
        self.geometry_file = path / "directions" / "geometry.json"
        self.rescored_file = path / "figures" / "rescored.json"
        self.report_file = path / "report.md"
        self.page_file = path / "report.html"
        # With answers to prompts that have the behaviour, which is why it has a name of its own that no mirror knows.
        self.answers_page_file = path / "report-with-answers.html"
        self.lock_file = path / ".lock"
        self.export_link = path / "export"

    def export_folder(self, trial: int, form: ExportFormat) -> Path:
        """Return the folder of a trial's export in a format."""
        return self.path / "exports" / (f"trial-{trial:04d}" + ("" if form == "merged" else f"-{form}"))

    def figures_file(self, subject: str) -> Path:
        """Return the file of the reported figures of a subject: "base" or "trial-NNNN"."""
        return self.path / "figures" / f"{subject}.json"

    def answers_file(self, subject: str) -> Path:
        """Return the file of sampled answers of a subject: "base" or "trial-NNNN"; it is in no mirror."""
        return self.path / "answers" / f"{subject}.json"

    def evaluation_file(self, trial: int) -> Path:
        """Return the file of what `abliterate evaluate` found of a trial."""
        return self.path / f"evaluation-{trial:04d}.json"

    def detectors_file(self, export: str) -> Path:
        """Return the file of what detectors say of an export."""
        return self.figures_file(f"{export}-detectors")

    def read_job(self) -> JobRecord:
        """Return job.json."""
        return read_record(self.job_file, JobRecord)

    def read_state(self) -> State | None:
        """Return state.json, None before the first start."""
        return read_record(self.state_file, State) if self.state_file.exists() else None

    def read_uploads(self) -> list[Upload]:
        """Return uploads.json, empty before the first delivery."""
        if not self.uploads_file.exists():
            return []
        return [Upload.model_validate(item) for item in json.loads(self.uploads_file.read_text())]

    def record_upload(self, upload: Upload) -> None:
        """Put a delivery's state into uploads.json in place of what stood there for its target."""
        others = [item for item in self.read_uploads() if item.target != redact(upload.target)]
        items = [json.loads(item.model_dump_json()) for item in (*others, upload)]
        write_atomically(self.uploads_file, (json.dumps(items, indent=2) + "\n").encode())

    def discard(self) -> None:
        """Remove the folder of a job that never got going, and a workspace that held nothing else."""
        shutil.rmtree(self.path, ignore_errors=True)
        workspace = self.path.parent
        if all(path.name == MEMO for path in workspace.iterdir()):
            shutil.rmtree(workspace, ignore_errors=True)

    def holder(self) -> HolderRecord | None:
        """Return who holds this job or has held it last, None if nobody has or the file is torn."""
        try:
            return HolderRecord.model_validate_json(self.holder_file.read_bytes())
        except (OSError, ValidationError):
            return None

    def is_held(self) -> bool:
        """Return whether a run holds this job now."""
        return is_locked(self.lock_file)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold this job for the block; the lock goes with the process, however it ends (`job.system.locks`).

        Raises:
            HeldError: Another run holds it.
        """
        lock = Lock(self.lock_file)
        try:
            make_folder(self.path)
            lock.acquire(_LOCK_SECONDS)
        except LockedError as error:
            holder = error.owner or self.holder()
            raise HeldError(
                f"job {self.path.name} is held by {holder.describe() if holder else 'another process'}",
                remedy=error.remedy,
                elsewhere=holder is not None and holder.process.boot_id != this_process().boot_id,
            ) from None
        except OSError as error:
            raise cannot_write(self.lock_file, error) from error
        try:
            write_record(self.holder_file, HolderRecord(process=this_process(), host=socket.gethostname()))
            yield
        finally:
            lock.release()


def _folder_digest(folder: Path, memo: Path, *, write: bool) -> str:
    """Return a hash of all files of a model folder.

    Files are hashed once: memo remembers what a file of the same size and time hashed to, so that a
    restart does not read a large model again.
    """
    known: dict[str, str] = {}
    if memo.exists():
        try:
            known = json.loads(memo.read_text())
        except json.JSONDecodeError:
            known = {}
    hashes: dict[str, str] = {}
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        stat = path.stat()
        key = f"{redact(str(path.resolve()))}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        hashes[key] = known.get(key) or sha256_file(path)
        digest.update(f"{path.name} {hashes[key]}\n".encode())
    if write and not hashes.keys() <= known.keys():
        write_atomically(memo, json.dumps({**known, **hashes}).encode())
    return digest.hexdigest()


def job_id(identity: Mapping[str, Any]) -> str:
    """Return the job's name: the start of the hash of its identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide results."""
    return {name: metadata.version(name) for name in PACKAGES}


def model_identity(settings: Settings, *, write: bool = True) -> dict[str, Any]:
    """Return the model as part of a job's identity.

    Raises:
        ImpossibleJobError: The model is not there.
        MachineError: The workspace cannot be written.
    """
    workspace = Path(settings.workspace)
    source = parse_model(settings.model)
    if source.kind == "folder" and not Path(source.name).is_dir():
        raise no_model_folder(source)
    if write:
        try:
            make_folder(workspace)
        except OSError as error:
            raise cannot_write(workspace, error) from error
    if source.kind == "hub":
        return dict(redacted({"repository": source.name, "revision": source.revision}))
    refuse_links_out(Path(source.name))
    return {"sha256": _folder_digest(Path(source.name), workspace / MEMO, write=write)}


def identify(settings: Settings, *, write: bool = True) -> dict[str, Any]:
    """Return what the user asked for, as far as it decides the result: a job's identity.

    Raises:
        ImpossibleJobError: The model or a prompt file is not there.
        MachineError: The workspace cannot be written.
    """
    prompts = {name: source_identity(source) for name, source in settings.prompt_sets().items()}
    model = model_identity(settings, write=write)
    unused = set(REFERENCE_SETS) - prompts.keys()
    asked = settings.model_dump(mode="json", exclude={*EXTENDING, *unused})
    for section, names in EXTENDING_WITHIN.items():
        asked[section] = {name: value for name, value in asked[section].items() if name not in names}
    # Records are written without secrets, and a job is known by the hash of what is written.
    return dict(redacted({**asked, **prompts, "model": model}))


def find_folder(settings: Settings) -> RunFolder:
    """Return where the job that settings describe has its folder, which need not be there.

    Nothing is written, not even the memo of hashes.
    """
    try:
        identity = identify(settings, write=False)
    except JobError:
        # What is missing has a check of its own.
        return RunFolder(Path(settings.workspace) / "-")
    return RunFolder(Path(settings.workspace) / job_id(identity))


def open_job(settings: Settings, *, new: bool, pinned: Mapping[str, Any] | None = None) -> tuple[RunFolder, JobRecord]:
    """Return the run folder of the job that the settings describe, made at the first start, and its record.

    The record is not written yet: that is for the run that holds the job.

    Args:
        settings: The settings.
        new: Start a job beside one with other settings.
        pinned: Fields of job.json that make it a job of its own, beside others on the same model.

    Raises:
        ImpossibleJobError: The model or a prompt file is not there.
        MachineError: The workspace cannot be written.
        UsageError: The workspace holds a job on the same model with other settings, and new is false.
    """
    identity = {**identify(settings), **(pinned or {})}
    folder = RunFolder(Path(settings.workspace) / job_id(identity))
    if not folder.job_file.exists() and not new and not pinned:
        others = {other.path.name: other.read_job().identity for other in jobs_in(folder.path.parent)}
        refuse_other_settings(str(folder.path.parent), others, identity)
    try:
        make_folder(folder.path)
    except OSError as error:
        raise cannot_write(folder.path, error) from error
    if folder.job_file.exists():
        return folder, folder.read_job().model_copy(update={"settings": _located(settings)})
    record = JobRecord(
        job_id=folder.path.name,
        identity=identity,
        settings=_located(settings),
        startup_trials=settings.effective_startup_trials,
        versions=versions(),
        **(pinned or {}),
    )
    return folder, record


def _located(settings: Settings) -> dict[str, Any]:
    """Return all settings with the model's absolute path, so that later commands work from any folder."""
    source = parse_model(settings.model)
    model = str(Path(source.name).absolute()) if source.kind == "folder" else settings.model
    return {**stored(settings), "model": model}


def stored(settings: Settings) -> dict[str, Any]:
    """Return the settings that job.json keeps: all but those that are about the machine of one start."""
    return settings.model_dump(mode="json", exclude=set(ENDS))


def refuse_other_settings(place: str, others: Mapping[str, Mapping[str, Any]], identity: Mapping[str, Any]) -> None:
    """Refuse to start a job where there is one on the same model with other settings.

    Args:
        place: The workspace or checkpoint.
        others: The identities of the jobs there, by their names.
        identity: That of the new job.

    Raises:
        UsageError: There is one.
    """
    for name, other in others.items():
        if other.get("model") != identity["model"] or "reproduces" in other:
            continue
        differences = sorted(_differences(other, identity))
        raise UsageError(
            f"{place} holds job {name} on this model with other settings: " + "; ".join(differences),
            remedy="restore them to continue it, or give --new to start another job",
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in {*old, *new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} was {_short(before)}, is {_short(after)}"


def _short(value: Any) -> str:
    text = redacted_json(value)  # before it is cut: a part of a secret is not recognised
    return text if len(text) <= 40 else text[:37] + "..."


def jobs_in(workspace: Path) -> list[RunFolder]:
    """Return the run folders of a workspace, in the order of their names."""
    if not workspace.is_dir():
        return []
    folders = [RunFolder(path) for path in sorted(workspace.iterdir()) if path.is_dir()]
    return [folder for folder in folders if folder.job_file.exists()]


def find_job(workspace: Path, name: str | None) -> RunFolder:
    """Return a job of a workspace, by its name or because it is alone there.

    Raises:
        UsageError: There is none, or several and none is named.
    """
    folders = jobs_in(workspace)
    names = ", ".join(folder.path.name for folder in folders)
    if name is not None:
        for folder in folders:
            if folder.path.name == name:
                return folder
        raise UsageError(
            f"there is no job {name} in {workspace}",
            remedy=f"choose from: {names}" if names else "check --workspace",
        )
    if not folders:
        raise UsageError(f"there is no job in {workspace}", remedy="check --workspace")
    if len(folders) > 1:
        raise UsageError(f"{workspace} holds several jobs: {names}", remedy="name one with --job")
    return folders[0]
