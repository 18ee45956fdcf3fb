"""HTTP client of rental platforms: retries transient failures, and never shows keys."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from job.errors import MachineError, UsageError, one_line
from job.system.retry import backoff_s, retried
from job.text.redaction import redact

if TYPE_CHECKING:
    import ssl

    import httpx2

# All 5xx, including those of proxies in front of the platform (520 to 527), may be transient.
_TRANSIENT = frozenset({408, 425, 429})
# Longest wait that a platform can request.
_LONGEST_ASKED = 300.0
_TIMEOUT_SECONDS = 30.0
_STREAM_SECONDS = 30.0
_DETAIL_CHARACTERS = 300
# The largest list of instances has some 100 kB, the largest log some MB.
_MOST_BYTES, _BODY_SECONDS = 64 << 20, 120.0


@cache
def _certificates() -> ssl.SSLContext:
    """Return the trusted certificates, cached: reading them takes longer than a request."""
    import httpx2

    return httpx2.create_ssl_context()


class CloudError(MachineError):
    """A rental platform is unreachable, or refuses a request.

    Attributes:
        passing: Whether a retry may succeed.
        uncertain: Whether the request may have succeeded anyway.
        asked_wait: Requested wait in seconds, or None.
    """

    asked_wait: float | None = None

    def __init__(
        self,
        what: str,
        *,
        remedy: str = "",
        status: int = 0,
        reason: str = "",
        passing: bool = False,
        uncertain: bool = False,
    ) -> None:
        super().__init__(what, remedy=remedy)
        self.status, self.reason, self.passing, self.uncertain = status, reason, passing, uncertain


class KeyRefusedError(CloudError):
    """The platform rejects the key, or the key lacks the permission."""

    exit_code = UsageError.exit_code


class GoneError(CloudError):
    """The requested object does not exist, or no longer."""


class NoMoneyError(CloudError):
    """The account has no credit: no offer can be taken."""

    exit_code = UsageError.exit_code


@dataclass(frozen=True)
class Patience:
    """Number of tries, and the doubling waits between them in seconds."""

    tries: int = 5
    first_wait: float = 1.0
    longest_wait: float = 30.0


@dataclass
class Api:
    """HTTP client of one rental platform's API, with retries.

    Attributes:
        base: URL; plain HTTP is accepted only to this machine, since requests carry the key.
        key: Bearer token, sent nowhere else.
        say: Receives a message at every retry.
        secrets: Further values to redact from messages.
    """

    platform: str
    base: str
    key: str = field(repr=False)
    key_name: str
    say: Callable[[str], None] = lambda _: None
    patience: Patience = Patience()
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Refuse an address that would expose the key to the network."""
        self.base = self.base.rstrip("/")
        address = urlsplit(self.base)
        local = address.hostname in ("127.0.0.1", "localhost", "::1")
        if not (address.scheme == "https" or (address.scheme == "http" and local)):
            raise UsageError(
                f"the address of {self.platform}'s API is not an https:// one", remedy="correct or unset the variable"
            )

    def call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str | int] | None = None,
        what: str,
        creating: bool = False,
    ) -> Any:
        """Return the decoded response, None if empty, after retries. Raises CloudError.

        `what` names the requested object for messages. A `creating` request rents something, and is never repeated if
        it may have succeeded.
        """

        def send(client: httpx2.Client) -> Any:
            with client.stream(method, self.base + path, json=body, params=params) as response:
                return self._decoded(response, self._read(response, what), what)

        return self._send_with_retries(send, what, creating=creating)

    def download(self, url: str, what: str) -> str:
        """Return the text at a URL from the platform, without sending the key. Raises CloudError."""

        def get(client: httpx2.Client) -> str:
            with client.stream("GET", url) as response:
                if response.status_code != 200:
                    # The storage answers 403 or 404 until it is written.
                    said = f"{what} is not there yet ({response.status_code})"
                    raise CloudError(said, status=response.status_code, passing=True)
                return self._read(response, what).decode(errors="replace")

        return str(self._send_with_retries(get, what, keyless=True))

    def lines(self, path: str, params: Mapping[str, str | int], *, what: str, quiet: float) -> list[str]:
        """Return a stream's lines until `quiet` seconds of silence, at most half a minute. Raises CloudError."""
        import httpx2

        def read(client: httpx2.Client) -> list[str]:
            found: list[str] = []
            deadline = time.monotonic() + _STREAM_SECONDS
            timeout = httpx2.Timeout(_TIMEOUT_SECONDS, read=quiet)
            try:
                with client.stream("GET", self.base + path, params=params, timeout=timeout) as response:
                    if response.status_code != 200:
                        self._decoded(response, self._read(response, what), what)
                    for line in response.iter_lines():
                        found.append(line)
                        if time.monotonic() >= deadline or response.num_bytes_downloaded > _MOST_BYTES:
                            break
            except httpx2.ReadTimeout:
                return found
            return found

        return list(self._send_with_retries(read, what))

    def hide(self, text: str) -> str:
        """Redact secrets in a text."""
        for secret in (self.key, *self.secrets):
            if len(secret) >= 4:
                text = text.replace(secret, "***")
        return redact(text)

    def _send_with_retries(
        self, send: Callable[[httpx2.Client], Any], what: str, *, creating: bool = False, keyless: bool = False
    ) -> Any:
        patience = self.patience

        def once() -> Any:
            with self._client(what, keyless=keyless) as client:
                return send(client)

        def wait_after(error: Exception, failures: int) -> float | None:
            if not isinstance(error, CloudError) or not error.passing or failures == patience.tries:
                return None
            if creating and error.uncertain:
                return None
            pause = error.asked_wait
            if pause is None:
                pause = backoff_s(failures, patience.first_wait, patience.longest_wait)
            if pause > _LONGEST_ASKED:
                return None
            self.say(f"{error}; trying again in {pause:.0f} s ({failures} of {patience.tries - 1})")
            return pause

        return retried(once, wait_after)

    @contextmanager
    def _client(self, what: str, *, keyless: bool) -> Iterator[httpx2.Client]:
        """Yield a client whose transport errors become clear messages."""
        import httpx2

        if not self.key and not keyless:
            raise KeyRefusedError(f"there is no key for {self.platform}", remedy=f"set {self.key_name}")
        headers = {} if keyless else {"Authorization": f"Bearer {self.key}"}
        try:
            with httpx2.Client(headers=headers, timeout=_TIMEOUT_SECONDS, verify=_certificates()) as client:
                yield client
        except httpx2.TransportError as error:
            never_sent = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
            raise CloudError(
                f"{self.platform} cannot be reached for {what} ({type(error).__name__})",
                remedy="check the network",
                passing=True,
                uncertain=not never_sent,
            ) from None  # the cause may quote a signed URL
        except (httpx2.InvalidURL, httpx2.DecodingError) as error:
            said = f"{self.platform} answers nonsense for {what} ({type(error).__name__})"
            raise CloudError(said, uncertain=isinstance(error, httpx2.DecodingError)) from None

    def rows(self, body: Any, key: str, what: str) -> list[Mapping[str, Any]]:
        """Return the tables of a response's list. Raises CloudError if it has none: that is not an empty one."""
        rows = body.get(key) if isinstance(body, Mapping) else None
        if not isinstance(rows, list):
            raise CloudError(f"{self.platform}'s response is not a list of {what}", passing=True)
        return [row for row in rows if isinstance(row, Mapping)]

    def _read(self, response: httpx2.Response, what: str) -> bytes:
        """Read a response, within limits of size and time. Raises CloudError beyond them."""
        data, deadline = bytearray(), time.monotonic() + _BODY_SECONDS
        for block in response.iter_bytes():
            data += block
            if len(data) > _MOST_BYTES or time.monotonic() > deadline:
                said = f"{self.platform}'s response for {what} does not end"
                raise CloudError(said, status=response.status_code, passing=True, uncertain=True)
        return bytes(data)

    def _decoded(self, response: httpx2.Response, data: bytes, what: str) -> Any:
        status = response.status_code
        try:
            body = json.loads(data) if data else None
        except (ValueError, RecursionError):
            body = None
            if 200 <= status < 300:
                # The request succeeded: only the response is unreadable.
                said = f"{self.platform} answers no JSON for {what}"
                raise CloudError(said, status=status, passing=True, uncertain=True) from None
        refused = isinstance(body, dict) and body.get("success") is False
        if 200 <= status < 300 and not refused:
            return body
        shown = self._detail(data, body if isinstance(body, dict) else {})
        raise self._failure(response, body if isinstance(body, dict) else {}, shown, what)

    def _failure(self, response: httpx2.Response, body: Mapping[str, Any], detail: str, what: str) -> CloudError:
        status = response.status_code
        reason = str(body.get("error") or body.get("title") or "")
        said = f"{self.platform} answers {status} for {what}" + (f": {detail}" if detail else "")
        if status == 402 or "insufficient_credit" in reason:
            return NoMoneyError(said, remedy="add credit to the account", status=status, reason=reason)
        if status in (401, 403):
            remedy = f"check {self.key_name} and what it may do"
            return KeyRefusedError(said, remedy=remedy, status=status, reason=reason)
        if status in (404, 410):
            return GoneError(said, status=status, reason=reason)
        passing = (status in _TRANSIENT or status >= 500) and reason != "search_quota_exceeded"
        # After these, a creating request may have succeeded.
        uncertain = status == 408 or status >= 500
        error = CloudError(said, status=status, reason=reason, passing=passing, uncertain=uncertain)
        asked = response.headers.get("Retry-After", "")
        # One platform uses a header, the other the text.
        threshold = re.search(r"threshold=(\d+(?:\.\d+)?)", detail)
        if re.fullmatch(r"\d+(\.\d+)?", asked):
            error.asked_wait = float(asked)
        elif status == 429 and threshold:
            error.asked_wait = float(threshold[1])
        return error

    def _detail(self, data: bytes, body: Mapping[str, Any]) -> str:
        parts = [str(body[name]) for name in ("msg", "message", "detail", "error") if body.get(name)][:1]
        errors = body.get("errors")
        parts += map(str, errors if isinstance(errors, list) else [])
        text = "; ".join(parts) if body else data.decode(errors="replace")
        return self.hide(one_line(text))[:_DETAIL_CHARACTERS]
