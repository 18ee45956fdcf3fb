"""Check a Hub target before a delivery, without changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from job.errors import DeliveryError, MachineError
from job.storage.exports import MANIFEST
from job.transfer.hub_repo import FRESH, Repository
from job.transfer.hub_target import MAIN, HubOptions

# Roles in an organization whose members may make repositories there.
_MAKERS = frozenset({"admin", "write", "contributor"})


@dataclass(frozen=True)
class Probe:
    """Whether a delivery can succeed, what was found, and the remedy."""

    ok: bool
    what: str
    remedy: str = ""


def probe(uri: str, options: HubOptions, *, report: Callable[[str], None] = lambda _: None) -> Probe:
    """Return whether the token may deliver to a target, without a trace. Raises DeliveryError or UsageError.

    For an existing repository the Hub reports write access; otherwise the token's rights in the namespace are read.
    """
    try:
        return _probe(Repository(uri, options, report))
    except DeliveryError as error:
        if isinstance(error.__cause__, MachineError):
            raise
        return Probe(False, str(error), error.remedy)


def _probe(repository: Repository) -> Probe:
    repo_id, options = repository.repo_id, repository.options
    account = repository.ask(repository.api.whoami, "the token")
    found = repository.look(MAIN)
    if found is None:
        return _may_make(account, repo_id)
    repository.refuse_public(found)
    if options.visibility != "private" and found.private and MANIFEST not in found.files and found.files.keys() - FRESH:
        return Probe(
            False,
            f"{repo_id} is private and holds other files, which would become public as well",
            "make it public on the Hub yourself, or name another repository",
        )
    if options.pull_request:
        if _token(account).get("role") == "read":
            return Probe(False, f"the token may only read, not open pull requests on {repo_id}", _needs(repo_id))
        return Probe(True, f"the token of {account['name']} may open pull requests on {repo_id}")
    repository.ask(lambda: repository.api.auth_check(repo_id, write=True), f"writing to {repo_id}")
    seen = "private" if found.private else "gated" if found.gated else "public"
    return Probe(True, f"the token of {account['name']} may write to {repo_id}, which is {seen}")


def _may_make(account: dict[str, Any], repo_id: str) -> Probe:
    """Return whether a token may create a repository that is missing or hidden from it."""
    namespace, name = repo_id.split("/")[0], account["name"]
    role = _token(account).get("role")
    if role == "fineGrained":
        allowed = any(
            scope["entity"].get("name") == namespace and "repo.write" in scope["permissions"]
            for scope in _token(account).get("fineGrained", {}).get("scoped", ())
        )
    elif role == "write":
        roles = {item["name"]: item.get("roleInOrg") for item in account.get("orgs", ())}
        allowed = namespace == name or roles.get(namespace) in _MAKERS
    else:
        allowed = False
    if allowed:
        return Probe(True, f"the token of {name} may make {repo_id}")
    return Probe(False, f"{repo_id} is not on the Hub and the token of {name} may not make it", _needs(repo_id))


def _token(account: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = account.get("auth", {}).get("accessToken") or {}
    return described


def _needs(repo_id: str) -> str:
    return f"give a HF_TOKEN that may write to {repo_id.split('/')[0]}"
