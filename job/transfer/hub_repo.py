"""A model repository on the Hub: create, gate, read, commit and publish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from job.errors import DeliveryError, ImpossibleJobError, MachineError
from job.system import hub_client as hub
from job.system.failpoints import reached
from job.transfer.hub_target import MAIN, HubOptions, find_token, parse_target

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

T = TypeVar("T")

# What a repository may hold from its creation on.
FRESH = frozenset({".gitattributes", "README.md"})
# The Hub's answers to a commit whose parent is no longer the last one.
_CONFLICTS = frozenset({409, 412})
_AGAIN = "run the same command again: what has arrived is not sent twice"


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it; sha256 is None where git alone keeps it."""

    size: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class Snapshot:
    """A revision of a repository at one moment."""

    sha: str
    private: bool
    gated: bool
    files: Mapping[str, RemoteFile]


class Repository:
    """A model repository as seen by the token; every failure is a `DeliveryError`."""

    def __init__(self, uri: str, options: HubOptions, report: Callable[[str], None]) -> None:
        """Prepare without connecting. Raises DeliveryError without a token, or UsageError for a wrong URI."""
        from huggingface_hub import HfApi

        self.target = parse_target(uri, options)
        self.options = options
        self.report = report
        if hub.is_offline():
            raise DeliveryError("HF_HUB_OFFLINE forbids the Hub", remedy="unset it and run the same command again")
        self._token = find_token(options)
        self.api = HfApi(token=self._token)

    @property
    def repo_id(self) -> str:
        """The repository's name."""
        return self.target.repo_id

    def url(self, sha: str) -> str:
        """Return a commit's URL."""
        return f"{self.api.endpoint}/{self.repo_id}/commit/{sha}"

    def ask(self, call: Callable[[], T], what: str) -> T:
        """Return a Hub call's result after retries. Raises DeliveryError, whose cause tells why."""
        try:
            return hub.with_retries(call, what, self.report)
        except (ImpossibleJobError, MachineError) as error:
            said = self._server_message(error.__cause__)
            raise DeliveryError(f"{error}{said}", remedy=f"{error.remedy}; then {_AGAIN}") from error
        except (ValueError, RuntimeError, OSError) as error:
            text = self._without_token((str(error).strip() or type(error).__name__).splitlines()[0])
            raise DeliveryError(f"the Hub's client failed at {what}: {text}", remedy=_AGAIN) from error

    def _server_message(self, error: BaseException | None) -> str:
        """Return the Hub's message, which distinguishes a full quota from a wrong token."""
        said = getattr(error, "server_message", None)
        return f": {self._without_token(' '.join(str(said).split())[:200])}" if said else ""

    def _without_token(self, text: str) -> str:
        return text.replace(self._token, "***")

    def look(self, revision: str) -> Snapshot | None:
        """Return a revision's current state, None if it or the repository is missing for this token."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        def call() -> Any:
            try:
                return self.api.model_info(self.repo_id, revision=revision, files_metadata=True)
            except GatedRepoError:
                raise
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

        info = self.ask(call, f"model {self.repo_id}")
        if info is None:
            return None
        files = {
            item.rfilename: RemoteFile(item.size or 0, item.blob_id or "", item.lfs.sha256 if item.lfs else None)
            for item in info.siblings or ()
        }
        return Snapshot(info.sha, bool(info.private), bool(info.gated), files)

    def see(self, revision: str) -> Snapshot:
        """Return an existing revision. Raises DeliveryError if it is missing."""
        found = self.look(revision)
        if found is None:
            raise DeliveryError(
                f"{self.repo_id} has no {revision} on the Hub, or not for this token",
                remedy=f"check the name and HF_TOKEN; then {_AGAIN}",
            )
        return found

    def prepare(self) -> None:
        """Create repository, gate and branch, publishing nothing. Raises DeliveryError, also for a public one."""
        found = self.look(MAIN)
        if found is None:
            self.ask(lambda: self.api.create_repo(self.repo_id, private=True, exist_ok=True), f"making {self.repo_id}")
            found = self.see(MAIN)
        self.refuse_public(found)
        if self.options.visibility == "gated" and not found.gated:
            self.ask(lambda: self.api.update_repo_settings(self.repo_id, gated="auto"), f"the gate of {self.repo_id}")
        branch = self.target.branch
        if branch != MAIN and self.look(branch) is None:
            self.ask(
                lambda: self.api.create_branch(self.repo_id, branch=branch, exist_ok=True),
                f"making branch {branch} of {self.repo_id}",
            )

    def refuse_public(self, found: Snapshot) -> None:
        """Raise DeliveryError for a public repository and a private delivery, which the Hub would publish."""
        if self.options.visibility == "private" and not found.private:
            raise DeliveryError(
                f"{self.repo_id} is public on the Hub and the delivery is to be private",
                remedy="make it private there, name another, or ask for --visibility public",
            )

    def holds_only(self, names: frozenset[str], found: Snapshot, *, delivered: bool) -> bool:
        """Return whether the repository's whole history holds only files with these names."""
        branch = self.target.branch
        history = self.ask(lambda: self.api.list_repo_commits(self.repo_id, revision=branch), f"commits of {branch}")
        refs = self.ask(
            lambda: self.api.list_repo_refs(self.repo_id, include_pull_requests=True), f"branches of {self.repo_id}"
        )
        allowed = {item.commit_id for item in history}
        heads = (*refs.branches, *refs.tags, *(refs.pull_requests or ()))
        return (
            found.files.keys() <= names | FRESH
            and len(history) <= (2 if delivered else 1)
            and all(ref.target_commit in allowed for ref in heads)
        )

    def show(self, found: Snapshot) -> None:
        """Publish a complete delivery as requested. Raises DeliveryError if the gate is missing, or the Hub refuses."""
        if self.options.visibility == "private" or not found.private:
            return
        if self.options.visibility == "gated" and not found.gated:
            raise DeliveryError(f"the gate of {self.repo_id} has been taken away", remedy=_AGAIN)
        self.ask(lambda: self.api.update_repo_settings(self.repo_id, private=False), f"showing {self.repo_id}")

    def store(self, operation: CommitOperationAdd) -> None:
        """Upload a file to the repository's storage, unreferenced, unless git alone keeps it. Raises DeliveryError."""
        name = operation.path_in_repo

        def call() -> None:
            try:
                self.api.preupload_lfs_files(
                    self.repo_id,
                    [operation],
                    revision=self.target.branch,
                    create_pr=self.options.pull_request,
                    free_memory=False,
                    gitignore_content="",  # whatever the repository's own would keep out
                )
            except RuntimeError as error:
                # The client wraps what went wrong with a file; its storage library's failures have no other type.
                wrapped = error.__cause__
                if isinstance(wrapped, Exception):
                    raise wrapped from wrapped.__cause__
                raise ConnectionError(str(error)) from error

        self.ask(call, f"{name} for {self.repo_id}")

    def commit(
        self,
        operations: Iterable[CommitOperationAdd | CommitOperationDelete],
        parent: str,
        request: Callable[[], str | None],
    ) -> str | None:
        """Commit all operations on top of a parent, on the branch or in a pull request; return the revision.

        It is None if the parent is not the branch's head, also after a lost response. `request` finds an existing pull
        request. Raises DeliveryError.
        """
        from huggingface_hub.errors import HfHubHTTPError

        operations = list(operations)

        def call() -> str | None:
            if self.options.pull_request and (found := request()) is not None:
                return found
            try:
                done = self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=self.options.commit_message,
                    revision=self.target.branch,
                    create_pr=self.options.pull_request,
                    parent_commit=parent,
                )
                reached("hub:committed")
            except HfHubHTTPError as error:
                if error.response.status_code in _CONFLICTS:
                    return None
                raise
            return done.pr_revision or done.oid

        return self.ask(call, f"the commit to {self.repo_id}")
