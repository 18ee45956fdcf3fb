"""The Hugging Face Hub's client with byte counts, retries and clear errors. Needs no torch."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from job.errors import ImpossibleJobError, JobError, MachineError
from job.system.retry import backoff_s, retried
from job.text.credentials import require_clean

T = TypeVar("T")

# Retry waits, doubling up to the longest.
TRIES, FIRST_WAIT, LONGEST_WAIT = 6, 1.0, 30.0
# The Hub limits requests per five minutes.
_LONGEST_ASKED = 301.0
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})


# Bytes received by the Hub's client, per reading thread.
_received: Counter[int] = Counter()
_counting = False


def count_traffic() -> None:
    """Count the bytes of the Hub's client from now on; replaces it, so no other thread may use it."""
    global _counting
    if _counting:
        return
    _counting = True
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    class Counted(httpx2.SyncByteStream):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            for block in self._stream:
                _received[threading.get_ident()] += len(block)
                yield block

        def close(self) -> None:
            self._stream.close()

    def count(response: Any) -> None:
        response.stream = Counted(response.stream)

    def client() -> Any:
        # The library's own client keeps timeouts, user agent and the environment's proxies.
        made = _http.default_client_factory()
        made.event_hooks = {**made.event_hooks, "response": [*made.event_hooks["response"], count]}
        return made

    set_client_factory(client)


def received_bytes() -> int:
    """Return the bytes that this thread received from the Hub since counting began."""
    return _received[threading.get_ident()]


def is_offline() -> bool:
    """Return whether the environment forbids the Hub (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def quiet_client() -> Iterator[None]:
    """Hide the client's progress bars, and signatures of upload URLs in logs."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    class Unsigned(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            record.msg, record.args = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", record.getMessage()), ()
            return True

    # If the environment controls the bars, the client warns about every attempt to change them.
    change = "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ and not are_progress_bars_disabled()
    unsigned, logger = Unsigned(), logging.getLogger("huggingface_hub.utils._http")
    if change:
        disable_progress_bars()
    logger.addFilter(unsigned)
    try:
        yield
    finally:
        logger.removeFilter(unsigned)
        if change:
            enable_progress_bars()


def token_source() -> str:
    """Return the variable or file that the Hub's token comes from."""
    from huggingface_hub import constants

    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return next((name for name in names if os.environ.get(name)), constants.HF_TOKEN_PATH)


def _require_clean_token() -> None:
    """Raise ImpossibleJobError for a malformed token, which the HTTP library would quote in its error."""
    from huggingface_hub import constants, get_token

    if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and not is_offline():
        require_clean(get_token() or "", token_source(), ImpossibleJobError)


def with_retries(call: Callable[[], T], what: str, report: Callable[[str], None]) -> T:
    """Return what `call` returns, retrying while the network or the Hub fails temporarily.

    `what` names what is fetched, for messages, e.g. "dataset allenai/c4"; `report` receives every retry. Raises
    ImpossibleJobError if the Hub refuses for good or the token is malformed, or MachineError if it cannot be reached.
    """
    _require_clean_token()

    def wait_after(error: Exception, failures: int) -> float | None:
        known = explained(error, what)
        if known is error:
            return None
        if not isinstance(known, MachineError) or failures == TRIES or is_offline():
            raise known from error
        pause = _asked_wait(error) or backoff_s(failures, FIRST_WAIT, LONGEST_WAIT)
        report(f"{known}; trying again in {pause:.0f} s ({failures} of {TRIES - 1})")
        return pause

    return retried(call, wait_after)


def explained(error: Exception, what: str) -> JobError | Exception:
    """Convert an error of the Hub's client to a clear one; others are returned unchanged."""
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return not_granted(what)
    if isinstance(error, errors.RevisionNotFoundError):
        return ImpossibleJobError(f"{what} has no such revision on the Hub", remedy="check the part after @")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ImpossibleJobError(
            f"{what} is not on the Hub, or not for this token",
            remedy="check the name; a private one needs a HF_TOKEN that may read it",
        )
    if isinstance(error, errors.LocalEntryNotFoundError) or (is_offline() and isinstance(error, ConnectionError)):
        return MachineError(
            f"{what} is not in the cache of this machine and the Hub is out of reach",
            remedy="allow network access, or prepare the cache",
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        if status in _TRANSIENT:
            return MachineError(f"the Hub answers {status} for {what}", remedy="try again later")
        if status in (401, 403):
            return ImpossibleJobError(f"the Hub refuses {what} ({status})", remedy="check HF_TOKEN and its rights")
        return ImpossibleJobError(f"the Hub answers {status} for {what}", remedy="check the name")
    if isinstance(error, httpx2.TransportError | ConnectionError | TimeoutError):
        return MachineError(f"the Hub cannot be reached for {what}", remedy="check the network")
    return error


def not_granted(what: str) -> ImpossibleJobError:
    """Return the error for a gated repository."""
    return ImpossibleJobError(
        f"access to {what} has not been granted", remedy="accept its terms on the Hub and give that account's HF_TOKEN"
    )


def _asked_wait(error: Exception) -> float | None:
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # public, not re-exported

    response = getattr(error, "response", None)
    if response is None:
        return None
    asked = response.headers.get("Retry-After", "")
    if asked.isdigit():
        return min(float(asked), _LONGEST_ASKED)
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    return min(limit.reset_in_seconds + 1.0, _LONGEST_ASKED) if limit is not None else None


# A name begins with a letter or digit, which excludes `..`.
REPOSITORY = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.ASCII)
