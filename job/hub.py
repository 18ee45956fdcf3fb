"""The Hugging Face Hub's client: bytes counted, faults retried, failures in plain words. Needs no torch."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from job.errors import ImpossibleJobError, JobError, MachineError

T = TypeVar("T")

# Waits of a call that is tried again: doubled each time, up to the longest.
TRIES, FIRST_WAIT, LONGEST_WAIT = 6, 1.0, 30.0
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})


class Traffic:
    """Bytes that the Hub's client has received in this process."""

    def __init__(self) -> None:
        self.received = 0

    def count(self) -> None:
        """From now on count the bodies of all of the client's responses, as they come over the line."""
        import httpx2
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils import _http

        traffic = self

        class Counted(httpx2.SyncByteStream):
            def __init__(self, stream: Any) -> None:
                self._stream = stream

            def __iter__(self) -> Iterator[bytes]:
                for block in self._stream:
                    traffic.received += len(block)
                    yield block

            def close(self) -> None:
                self._stream.close()

        def count(response: Any) -> None:
            response.stream = Counted(response.stream)

        def client() -> Any:
            # The library's own client, so that its timeouts, its user agent and the proxies of the environment stay.
            made = _http.default_client_factory()
            made.event_hooks = {**made.event_hooks, "response": [*made.event_hooks["response"], count]}
            return made

        set_client_factory(client)


def is_offline() -> bool:
    """Return whether the environment forbids the Hub (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def patiently(call: Callable[[], T], what: str, report: Callable[[str], None]) -> T:
    """Return what call returns, trying again where the network or the Hub fails for a while.

    Args:
        call: Talks to the Hub.
        what: What it is after, e.g. "dataset allenai/c4", for messages.
        report: Told of every failure that is tried again.

    Raises:
        ImpossibleJobError: The Hub says no for good.
        MachineError: The Hub cannot be reached from here.
    """
    wait = FIRST_WAIT
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            known = explained(error, what)
            if not isinstance(known, MachineError) or attempt == TRIES or is_offline():
                raise known from error
            pause = _asked_wait(error) or min(wait, LONGEST_WAIT) * random.uniform(0.5, 1.0)
            report(f"{known}; trying again in {pause:.0f} s ({attempt} of {TRIES - 1})")
            time.sleep(pause)
            wait *= 2
    raise AssertionError("unreachable")


def explained(error: Exception, what: str) -> JobError | Exception:
    """Return a failure of the Hub's client in plain words; one that is no such failure is returned as it is."""
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
    """Return the seconds that the Hub asks to wait, if it does, within reason."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), 300.0) if asked.isdigit() else None
