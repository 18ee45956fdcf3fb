"""The history of a mirror's Hub branch, squashed once long: every commit keeps a snapshot."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from job.errors import DeliveryError
from job.mirror.lease import is_running
from job.mirror.records import MirrorError, decode_head
from job.mirror.store import MirrorStore, Stored
from job.transfer.hub_repo import Repository

# Commits before a squash: one per snapshot, hence at most one a minute.
_LONGEST = 200


class HubHistory:
    """Commits of a mirror's branch."""

    def __init__(self, repo: Repository, store: MirrorStore) -> None:
        self._repo, self._store = repo, store
        self._commits = 0  # since the last squash or count

    def look(self) -> None:
        """Schedule a squash if the history exceeds one page of the Hub's list."""
        repo = self._repo
        answer = repo.ask(
            lambda: request_commits(repo, repo.target.branch, limit=_LONGEST), f"commits of {repo.repo_id}"
        )
        if "next" in answer.links:
            self._commits = _LONGEST

    def extended(self, job: str, stored: Stored) -> Stored:
        """Count a commit of a job's head, squash a long history, and return the head; failures are retried later."""
        self._commits += 1
        if self._commits < _LONGEST:
            return stored
        self._commits = 0
        try:
            if self._has_other_runners(job):
                return stored
            self._squash()
            found = self._store.read(job)
        except DeliveryError as error:
            self._repo.report(f"warning: cannot squash the history of {self._repo.repo_id}: {error.line}")
            return stored
        # If another runner's head came between, the former commit stays expected, and its replacement fails.
        return found if found is not None and found.data == stored.data else stored

    def _squash(self) -> None:
        repo = self._repo
        repo.ask(
            lambda: repo.api.super_squash_history(
                repo.repo_id, branch=repo.target.branch, commit_message=repo.options.commit_message
            ),
            f"squashing the history of {repo.repo_id}",
        )

    def _has_other_runners(self, job: str) -> bool:
        """Return whether another job's runner may commit to the same branch."""
        for other in self._store.jobs():
            try:
                stored = self._store.read(other) if other != job else None
                if stored is not None and is_running(decode_head(stored.data, other, self._store.uri), stored):
                    return True
            except MirrorError:
                return True  # unreadable, so its writer is unknown
        return False


def request_commits(repo: Repository, revision: str, *, limit: int) -> Any:
    """Return the Hub's response with a revision's latest commits."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not re-exported
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    url = f"{repo.api.endpoint}/api/models/{repo.repo_id}/commits/{quote(revision, safe='')}"
    answer = get_session().get(url, params={"limit": limit}, headers=build_hf_headers(token=repo.api.token))
    hf_raise_for_status(answer)
    return answer
