"""Options of a delivery to the Hub: branch, visibility and token."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from job.errors import DeliveryError, UsageError
from job.system.hub_client import token_source
from job.text.credentials import require_clean
from job.text.redaction import remember

MAIN = "main"
_OTHER_KINDS = frozenset({"models", "datasets", "spaces", "kernels", "buckets"})


@dataclass(frozen=True)
class HubOptions:
    """Options of a delivery to the Hub.

    Attributes:
        visibility: "private": the owner; "public": everybody; "gated": accounts that accept the terms of access (public
            page, automatic approval; a stricter existing gate is kept). A new repository stays private until everything
            is verified, and its gate is set before the first file.
        revision: The branch, created from main if missing; None for the URI's, or main.
        pull_request: Leave an open pull request to main; visibility then stays unchanged, except for a gate.
        token: The token; None for HF_TOKEN, the file HF_TOKEN_PATH or the Hub client's own store.
    """

    visibility: Literal["private", "gated", "public"] = "private"
    revision: str | None = None
    pull_request: bool = False
    commit_message: str = "Add the edited model"
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class HubTarget:
    """A branch of a model repository."""

    repo_id: str
    branch: str


def parse_target(uri: str, options: HubOptions) -> HubTarget:
    """Parse an hf://user/repo[@branch] URI. Raises UsageError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported

    match = re.fullmatch(r"hf://([^/@\s]+/[^/@\s]+)(?:@([^\s@]+))?", uri)
    if match is None or match[1].split("/")[0] in _OTHER_KINDS:
        raise UsageError(f"{uri!r} names no model repository", remedy="write hf://user/repo or hf://user/repo@branch")
    try:
        validate_repo_id(match[1])
    except HFValidationError as error:
        raise UsageError(f"the Hub allows no repository of the name {match[1]!r}", remedy=str(error)) from error
    branches = {name for name in (match[2], options.revision) if name is not None}
    if len(branches) > 1:
        raise UsageError(f"{uri} and the revision {options.revision} name two branches", remedy="name one")
    branch = branches.pop() if branches else MAIN
    if options.pull_request and branch != MAIN:
        raise UsageError(f"a pull request goes to main, not to {branch}", remedy="leave the branch or the request out")
    return HubTarget(match[1], branch)


def find_token(options: HubOptions) -> str:
    """Return the token. Raises DeliveryError, without quoting it, if it is missing or malformed."""
    from huggingface_hub import get_token

    token = (options.token or get_token() or "").strip()
    remember(token)
    if not token:
        raise DeliveryError("there is no token for the Hub", remedy="set HF_TOKEN to one that may write there")
    require_clean(token, "the token for the Hub" if options.token else token_source(), DeliveryError)
    return token
