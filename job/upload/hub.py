"""Delivery to the Hugging Face Hub: readers see a whole export or nothing of it.

Shards are sent one by one into the repository's storage, unreferenced; then a single commit adds all of them with
manifest.json, and removes an earlier delivery's other files. A commit is atomic: readers of a branch always find the
files of exactly one manifest, so manifest.json is the completion marker. `HfApi.upload_folder` would split the files
into commits between which two trials mix. Merging a pull request or branch last would need more rights and leave
traces. The Hub takes 25,000 large files per commit; an export has hundreds.

An interruption costs at most the current file: the Hub knows received contents by SHA-256, committed or not, and the
client does not send them again. No state is kept here; another run reads the branch. The commit names its parent, so a
commit in between is detected and not overwritten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from job.errors import DeliveryError, JobError
from job.records import Manifest, ManifestEntry
from job.storage.atomic import read_record
from job.storage.exports import CARD, DONE, MANIFEST, is_sealed
from job.system.hub_client import quiet_client
from job.system.tempdirs import scratch
from job.transfer.hub_probe import Probe, probe
from job.transfer.hub_repo import FRESH, Repository, Snapshot
from job.transfer.hub_target import MAIN, HubOptions, parse_target

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

__all__ = ["HubOptions", "Probe", "deliver", "parse_target", "prepare", "probe"]

# Times that a delivery looks at the branch again because somebody else has committed to it meanwhile.
_LOOKS = 5
# Files that a message names, and open pull requests that are looked into, the latest ones.
_NAMED, _REQUESTS = 5, 20


def prepare(uri: str, options: HubOptions, *, report: Callable[[str], None]) -> None:
    """Create the target's repository at the start of a run. Raises DeliveryError or UsageError."""
    Repository(uri, options, report).prepare()


def deliver(
    export: Path,
    uri: str,
    options: HubOptions,
    *,
    report: Callable[[str], None],
    progress: Callable[[int], None],
) -> str:
    """Deliver an export to the Hub and verify it; return the URL of the commit or pull request. Idempotent.

    Files of an earlier delivery are replaced or removed; others are kept. `progress` gets the number of arrived files,
    manifest.json included. Raises DeliveryError, with the export unchanged, or UsageError.
    """
    repository = Repository(uri, options, report)
    delivery = _Delivery(export, repository, progress)
    with quiet_client():
        repository.prepare()
        return delivery.propose() if options.pull_request else delivery.publish()


@dataclass(frozen=True)
class _Changes:
    """Changes to a revision: files to put, the marker last, and files to remove."""

    put: tuple[str, ...]
    remove: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.put or self.remove)

    def __str__(self) -> str:
        return _listed((*self.put, *self.remove))


class _Delivery:
    def __init__(self, export: Path, repository: Repository, progress: Callable[[int], None]) -> None:
        if not is_sealed(export):
            raise DeliveryError(f"{export} is not a complete export", remedy="let the run complete it")
        self._export = export
        self._repo = repository
        self._progress = progress
        self._files = dict(read_record(export / MANIFEST, Manifest).files)
        size = (export / MANIFEST).stat().st_size
        self._files[MANIFEST] = ManifestEntry(sha256=(export / DONE).read_text().strip(), size=size)
        self._arrived: set[str] = set()
        for name, entry in self._files.items():
            if not (export / name).is_file() or (export / name).stat().st_size != entry.size:
                raise self._damaged(name)

    def publish(self) -> str:
        """Bring the branch to the export and verify it; return its commit's URL."""
        branch, committed = self._repo.target.branch, False
        for _ in range(_LOOKS):
            found = self._repo.see(branch)
            changes = self._changes(found)
            if committed and changes:
                raise self._mismatch(branch, changes)
            self._refuse_to_expose(found)
            if not changes:
                return self._published(found)
            committed = self._commit(found, changes) is not None
        raise DeliveryError(
            f"others keep committing to {branch} of {self._repo.repo_id}", remedy="run the same command again later"
        )

    def propose(self) -> str:
        """Open a pull request that brings main to the export; return its URL."""
        found = self._repo.see(MAIN)
        changes = self._changes(found)
        if not changes:
            return self._repo.url(found.sha)
        reference = self._open_request() or self._commit(found, changes)
        if reference is None:
            raise DeliveryError(f"main of {self._repo.repo_id} has changed meanwhile", remedy="run the command again")
        if missing := self._changes(self._repo.see(reference)):
            raise self._mismatch(reference, missing)
        self._arrive(*self._files)
        return f"{self._repo.api.endpoint}/{self._repo.repo_id}/discussions/{reference.rpartition('/')[2]}"

    def _published(self, found: Snapshot) -> str:
        self._arrive(*self._files)
        self._repo.show(found)
        if strangers := sorted(found.files.keys() - self._files.keys() - FRESH):
            self._repo.report(f"{self._repo.repo_id} holds other files beside the delivery's: {_listed(strangers)}")
        return self._repo.url(found.sha)

    def _mismatch(self, revision: str, changes: _Changes) -> DeliveryError:
        return DeliveryError(
            f"{revision} of {self._repo.repo_id} does not hold what was sent: {changes}",
            remedy="see who else writes there and run the same command again",
        )

    # --- what is there and what is not --------------------------------------------------------------------

    def _changes(self, found: Snapshot) -> _Changes:
        """Return a revision's missing changes. Raises DeliveryError if they would overwrite foreign files."""
        put = tuple(name for name in self._files if not self._is_there(found, name))
        earlier = self._earlier(found)
        allowed = earlier | (FRESH if found.files.keys() <= FRESH else frozenset())
        if strangers := [name for name in put if name in found.files and name not in allowed]:
            raise DeliveryError(
                f"{self._repo.repo_id} holds other files of the same names: {_listed(strangers)}",
                remedy="name another repository or branch, or remove them there",
            )
        self._arrive(*(name for name in self._files if name not in put))
        return _Changes(put, tuple(sorted((earlier & found.files.keys()) - self._files.keys())))

    def _is_there(self, found: Snapshot, name: str) -> bool:
        entry, remote = self._files[name], found.files.get(name)
        if remote is None or remote.size != entry.size:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == entry.sha256
        # Git knows small files by a hash of its own; the local file's sha256 is compared before it is sent.
        return remote.blob_id == _git_hash(self._export / name, entry.size)

    def _earlier(self, found: Snapshot) -> frozenset[str]:
        if MANIFEST not in found.files:
            return frozenset()
        if self._is_there(found, MANIFEST):
            return frozenset(self._files)
        with scratch("manifest") as folder:
            path = self._repo.ask(
                lambda: self._repo.api.hf_hub_download(
                    self._repo.repo_id, MANIFEST, revision=found.sha, cache_dir=folder
                ),
                f"{MANIFEST} of {self._repo.repo_id}",
            )
            try:
                return frozenset({*read_record(Path(path), Manifest).files, MANIFEST})
            except JobError:
                return frozenset()  # somebody else's file of this name

    def _refuse_to_expose(self, found: Snapshot) -> None:
        """Refuse to publish a private repository with other files in its history."""
        if self._repo.options.visibility == "private" or not found.private:
            return
        delivered = MANIFEST in found.files and self._is_there(found, MANIFEST)
        if not self._repo.holds_only(frozenset(self._files), found, delivered=delivered):
            raise DeliveryError(
                f"{self._repo.repo_id} is private and has held other files, which would become public as well",
                remedy="make it public on the Hub yourself, or name another repository",
            )

    def _open_request(self) -> str | None:
        """Return the reference of an open pull request with this export, from an earlier attempt."""

        def references() -> list[str]:
            found = self._repo.api.get_repo_discussions(
                self._repo.repo_id, discussion_type="pull_request", discussion_status="open"
            )
            return [f"refs/pr/{item.num}" for item in islice(found, _REQUESTS)]

        for reference in self._repo.ask(references, f"pull requests of {self._repo.repo_id}"):
            there = self._repo.look(reference)
            if there is not None and all(self._is_there(there, name) for name in self._files):
                return reference
        return None

    # --- sending ------------------------------------------------------------------------------------------

    def _arrive(self, *names: str) -> None:
        new = set(names) - self._arrived
        self._arrived |= new
        if new:
            self._progress(len(new))

    def _commit(self, found: Snapshot, changes: _Changes) -> str | None:
        """Send the files and commit them; return None if the branch has moved."""
        from huggingface_hub import CommitOperationDelete

        if CARD in changes.put:
            self._check_card()
        sent = [self._send(name) for name in changes.put]
        removed = [CommitOperationDelete(name) for name in changes.remove]
        return self._repo.commit([*sent, *removed], found.sha, self._open_request)

    def _check_card(self) -> None:
        """Let the Hub validate the card's metadata now, instead of refusing the commit hours later."""
        from huggingface_hub import ModelCard

        try:
            card = ModelCard.load(self._export / CARD)
        except Exception as error:  # the client passes on what its YAML library raises
            raise DeliveryError(f"the metadata of {CARD} cannot be read", remedy="export again") from error
        self._repo.ask(card.validate, f"the metadata of {CARD}")

    def _send(self, name: str) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=self._export / name)
        self._repo.store(operation)
        if operation.upload_info.sha256.hex() != self._files[name].sha256:
            raise self._damaged(name)
        self._arrive(name)
        return operation

    def _damaged(self, name: str) -> DeliveryError:
        return DeliveryError(
            f"{self._export / name} is not what the export's manifest says", remedy="check the disk and export again"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _git_hash(path: Path, size: int) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size)
    digest.update(path.read_bytes())
    return digest.hexdigest()
