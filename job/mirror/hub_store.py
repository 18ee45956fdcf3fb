"""Mirrors in a private Hub repository: one commit, naming its parent, holds a head and its objects."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from job.errors import DeliveryError
from job.mirror.hub_history import HubHistory, request_commits
from job.mirror.options import HUB_PACE, SnapshotPace
from job.mirror.records import HEAD, MOST_HEAD_BYTES, OBJECTS, MirroredFile, oversized_head
from job.mirror.store import ConflictError, OversizedError, Proof, Stored, changed
from job.system.hub_client import count_traffic, quiet_client
from job.system.tempdirs import scratch
from job.transfer.hub_probe import probe
from job.transfer.hub_repo import Repository, Snapshot
from job.transfer.hub_target import MAIN, HubOptions

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

T = TypeVar("T")

# Retries of a commit on top of another job's in the same repository.
_LOOKS = 8


class _SquashedError(Exception):
    """A revision is gone: the branch was squashed since."""


class HubStore:
    """Mirrors in hf://user/repo[@branch]."""

    def __init__(
        self,
        uri: str,
        token: str | None = None,
        pace: SnapshotPace | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare without connecting. Raises DeliveryError without a token, or UsageError for a wrong URI."""
        self.uri = uri
        self.pace = pace or HUB_PACE
        self._options = HubOptions(visibility="private", token=token, commit_message="Checkpoint")
        self._repo = Repository(uri, self._options, report)
        self._staged: dict[str, CommitOperationAdd] = {}
        self._seen: Snapshot | None = None
        self._history = HubHistory(self._repo, self)
        # This replaces the client, which must not happen while a thread uses it.
        count_traffic()
        self._open = ExitStack()
        # While the store is open: another thread's delivery would show the bars again.
        self._open.enter_context(quiet_client())

    def close(self) -> None:
        """Restore the client's progress bars."""
        self._open.close()

    def probe(self) -> Proof:
        """Check that the token may write, without changes."""
        found = self._repo.look(MAIN)
        if found is not None:
            self._refuse_public(found)
        known = probe(self.uri, self._options, report=self._repo.report)
        if not known.ok:
            raise DeliveryError(known.what, remedy=known.remedy)
        quirk = f"the Hub limits commits: a snapshot is taken every {self.pace.snapshot_s:.0f} s at most"
        return Proof(known.what, fenced=True, quirks=(quirk,))

    def prepare(self) -> None:
        """Create the repository and branch if missing. Raises DeliveryError, also if the repository is public."""
        found = self._repo.look(MAIN)
        if found is not None:
            self._refuse_public(found)
        self._repo.prepare()

    def _refuse_public(self, found: Snapshot) -> None:
        if not found.private:
            raise DeliveryError(
                f"{self._repo.repo_id} is public on the Hub, but a checkpoint holds prompts and answers",
                remedy="make it private there or name another repository for --checkpoint",
            )

    def _read_snapshot(self) -> Snapshot | None:
        found = self._repo.look(self._repo.target.branch)
        if found is not None:
            self._refuse_public(found)
        self._seen = found
        return found

    def jobs(self) -> list[str]:
        """Return the jobs with a head."""
        found = self._read_snapshot()
        names = [name.split("/") for name in found.files] if found else []
        return sorted(parts[0] for parts in names if len(parts) == 2 and parts[1] == HEAD)

    def read(self, job: str) -> Stored | None:
        """Return the head at the branch's latest commit, the parent of the next one."""
        for _ in range(_LOOKS):
            found = self._read_snapshot()
            if found is None or f"{job}/{HEAD}" not in found.files:
                return None
            if found.files[f"{job}/{HEAD}"].size > MOST_HEAD_BYTES:
                raise oversized_head(self.uri, job)
            try:
                data = self._download(f"{job}/{HEAD}", found.sha, Path.read_bytes)
                return Stored(data, found.sha, self._age(found.sha))
            except _SquashedError:
                continue
        raise DeliveryError(f"the history of {self._repo.repo_id} keeps changing", remedy="try again later")

    def _age(self, sha: str) -> float | None:
        """Return seconds since a commit by the Hub's clock; other jobs' commits make it seem younger."""
        answer = self._of_revision(
            lambda: request_commits(self._repo, sha, limit=1), f"the age of {self._repo.repo_id}"
        )
        try:
            written = datetime.fromisoformat(answer.json()[0]["date"])
            now = parsedate_to_datetime(answer.headers["date"])
            return max((now - written).total_seconds() - 1.0, 0.0)
        except (ValueError, LookupError, TypeError):
            return None

    def _download(self, name: str, revision: str, take: Callable[[Path], T]) -> T:
        api, repo_id = self._repo.api, self._repo.repo_id
        with scratch("mirror") as folder:
            return take(
                self._of_revision(
                    lambda: Path(api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder)),
                    f"{name} of {repo_id}",
                )
            )

    def _of_revision(self, call: Callable[[], T], what: str) -> T:
        """Return the result of a call that names a revision. Raises _SquashedError if it is gone, or DeliveryError."""
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            return self._repo.ask(call, what)
        except DeliveryError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, RevisionNotFoundError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise _SquashedError from error

    def names(self, job: str) -> list[str]:
        """Return all files of the job except the head."""
        found = self._read_snapshot()
        root = f"{job}/"
        files = found.files if found else {}
        return [name for path in files if path.startswith(root) and (name := path.removeprefix(root)) != HEAD]

    def stage(self, job: str, objects: Mapping[str, tuple[Path, MirroredFile]], check: Callable[[], None]) -> None:
        """Upload large files unreferenced; small ones go with the commit."""
        from huggingface_hub import CommitOperationAdd

        # Repeated at each attempt: small files are read at commit, from copies made for that attempt.
        staged: dict[str, CommitOperationAdd] = {}
        for name, (source, entry) in objects.items():
            check()
            operation = CommitOperationAdd(f"{job}/{OBJECTS}/{name}", str(source))
            if operation.upload_info.sha256.hex() != entry.sha256:
                raise changed(source)
            self._repo.store(operation)
            staged[name] = operation
        self._staged = staged

    def replace(self, job: str, data: bytes, expected: Stored | None, remove: Collection[str]) -> Stored:
        """Commit the head, staged objects and removals on top of the expected revision."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        parent = expected.token if expected else self._parent(job)
        # A heartbeat may come between: it names no staged objects.
        named = [operation for name, operation in self._staged.items() if name.encode() in data]
        for _ in range(_LOOKS):
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *named,
                CommitOperationAdd(f"{job}/{HEAD}", data),
                *(CommitOperationDelete(f"{job}/{OBJECTS}/{name}") for name in remove),
            ]
            sha = self._repo.commit(operations, parent, lambda: None)
            if sha is not None:
                if named:
                    self._staged = {}
                return self._history.extended(job, Stored(data, sha, 0.0))
            # Another job may have committed too: retry.
            found = self.read(job)
            if (found and found.data) != (expected and expected.data):
                raise ConflictError(found)
            parent = found.token if found else self._parent(job)
        raise DeliveryError(
            f"other processes keep committing to {self._repo.repo_id}", remedy="give each job its own repository"
        )

    def _parent(self, job: str) -> str:
        """Return the branch's latest commit. Raises ConflictError if it has a head of the job."""
        found = self._read_snapshot() or self._repo.see(self._repo.target.branch)
        if f"{job}/{HEAD}" in found.files:
            raise ConflictError(self.read(job))
        return found.sha

    def sweep(self, job: str, keep: AbstractSet[str]) -> None:
        """Squash a long history; commits leave no unreferenced objects."""
        self._history.look()

    def fetch(self, job: str, entry: MirroredFile, target: Path) -> None:
        """Download an object at the head's revision, if it still exists."""
        name = f"{job}/{OBJECTS}/{entry.object}"
        for _ in range(_LOOKS):
            if self._seen is None or name not in self._seen.files:
                self._read_snapshot()
            if self._seen is None or name not in self._seen.files:
                break
            if self._seen.files[name].size > entry.size:
                raise OversizedError
            try:
                self._download(name, self._seen.sha, lambda path: shutil.move(path, target))
            except _SquashedError:
                self._seen = None
            else:
                return
        raise FileNotFoundError(name)
