"""Access rights, and the errors by which clients recognize a refusal."""

from __future__ import annotations

from tests.fakes.hub.server import HubError
from tests.fakes.hub.store import Commit, Repo, Token

WRONG_TOKEN = "Invalid credentials in Authorization header"
NO_TOKEN = "Invalid username or password."


def not_found(token: Token | None) -> HubError:
    """Return the error for a repository that is missing, or must look missing."""
    return HubError(404 if token else 401, "Repository not found" if token else NO_TOKEN, "RepoNotFound")


def need_token(token: Token | None) -> Token:
    if token is None:
        raise HubError(401, NO_TOKEN)
    return token


def need_read(repo: Repo | None, token: Token | None) -> Repo:
    if repo is None or (repo.private and (token is None or token.right(repo.id) is None)):
        raise not_found(token)
    return repo


def need_entry(repo: Repo, token: Token | None) -> None:
    """Refuse the files of a gated repository without granted access."""
    if not repo.gated or (token is not None and token.enters(repo)):
        return
    text = f"Access to {repo.kind} {repo.id} is restricted"
    if token is None:
        raise HubError(401, f"{text}. You must have access to it and be authenticated to access it.", "GatedRepo")
    raise HubError(403, f"{text} and you are not in the authorized list.", "GatedRepo")


def need_write(repo: Repo, token: Token | None) -> Token:
    token = need_token(token)
    if token.right(repo.id) != "write":
        raise HubError(403, f"You do not have write access to {repo.kind} {repo.id}")
    return token


def need_push(repo: Repo, token: Token | None, revision: str | None, *, create_pr: bool = False) -> Token:
    """Let writers push anywhere, and others with a token that writes to pull requests only."""
    token = need_token(token)
    if token.right(repo.id) == "write":
        return token
    if token.role == "read":
        raise HubError(403, "You must use a token with write access to upload to a repository")
    own = any(pull.ref == revision and pull.author == token.user for pull in repo.pulls.values())
    if not create_pr and not own:
        raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
    return token


def need_namespace(namespace: str, token: Token | None, kind: str) -> Token:
    token = need_token(token)
    if token.right(namespace) != "write":
        raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    return token


def need_commit(repo: Repo, revision: str) -> Commit:
    commit = repo.find(revision)
    if commit is None:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def entry_not_found(path: str) -> HubError:
    return HubError(404, f"Entry not found: {path}", "EntryNotFound")
