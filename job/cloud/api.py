"""HTTP APIs of rental platforms: patient with what passes, and silent about keys."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from job.errors import MachineError, UsageError
from job.text.redaction import redact

if TYPE_CHECKING:
    import ssl

    import httpx2

# Beside all answers of 5xx, also those of networks in front of the platform (520 to 527): what fails there may pass.
_TRANSIENT = frozenset({408, 425, 429})
# A platform that asks for a longer wait than this is not waited for.
_LONGEST_ASKED = 300.0
_TIMEOUT_SECONDS = 30.0
_STREAM_SECONDS = 30.0
_DETAIL_CHARACTERS = 300


@cache
def _certificates() -> ssl.SSLContext:
    """Return the certificates to trust. Reading them takes longer than a request, and a watch asks for days."""
    import httpx2

    return httpx2.create_ssl_context()


class CloudError(MachineError):
    """A rental platform cannot be reached, or does not do what was asked.

    Attributes:
        status: The HTTP status of the answer, 0 where there was none.
        reason: The platform's own short name of the failure, "" where it gives none.
        passing: Whether the same request may succeed later.
        uncertain: Whether the platform may have done what was asked all the same.
        asked_wait: Seconds that the platform asks to wait, None where it does not.
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
    """The platform does not take the key, or the key may not do this."""

    exit_code = UsageError.exit_code


class GoneError(CloudError):
    """What was asked about is not there, or is no longer."""


class NoMoneyError(CloudError):
    """The account has no credit left: no offer can be taken."""

    exit_code = UsageError.exit_code


@dataclass(frozen=True)
class Patience:
    """How often a call is tried, and the waits between, which double: seconds."""

    tries: int = 5
    first_wait: float = 1.0
    longest_wait: float = 30.0


@dataclass
class Api:
    """One platform's API.

    Attributes:
        platform: Its name for people.
        base: Where it is; plain HTTP only on this machine, since the key goes there.
        key: Sent as a bearer token, and nowhere else.
        key_name: The environment variable that holds it, for messages.
        say: Told of every failure that is tried again.
        patience: How often calls are tried.
        secrets: Values that are kept out of messages beside the key and the environment's.
    """

    platform: str
    base: str
    key: str = field(repr=False)
    key_name: str
    say: Callable[[str], None] = lambda _: None
    patience: Patience = Patience()
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Refuse an address that would show the key to the network."""
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
        """Return the decoded answer, None where it is empty, trying again where the failure may pass.

        Args:
            method: HTTP method.
            path: Path below the base.
            body: Sent as JSON.
            params: Sent as the query.
            what: What is asked for, e.g. "instance 123", for messages.
            creating: The request rents something: it is not repeated where it may have succeeded.

        Raises:
            CloudError: The platform says no, or cannot be reached.
        """

        def send(client: httpx2.Client) -> Any:
            return self._decoded(client.request(method, self.base + path, json=body, params=params), what)

        return self._patiently(send, what, creating=creating)

    def download(self, url: str, what: str) -> str:
        """Return the text at an address that the platform has handed out; the key does not go there.

        Raises:
            CloudError: It cannot be had.
        """

        def get(client: httpx2.Client) -> str:
            response = client.get(url)
            if response.status_code != 200:
                # Until it is written the storage answers 403 or 404.
                said = f"{what} is not there yet ({response.status_code})"
                raise CloudError(said, status=response.status_code, passing=True)
            return response.text

        return str(self._patiently(get, what, keyless=True))

    def lines(self, path: str, params: Mapping[str, str | int], *, what: str, quiet: float) -> list[str]:
        """Return the lines of a stream that stays open, up to the first silence of so many seconds.

        One that is never silent is left after half a minute.

        Raises:
            CloudError: The platform says no, or cannot be reached.
        """
        import httpx2

        def read(client: httpx2.Client) -> list[str]:
            found: list[str] = []
            deadline = time.monotonic() + _STREAM_SECONDS
            timeout = httpx2.Timeout(_TIMEOUT_SECONDS, read=quiet)
            try:
                with client.stream("GET", self.base + path, params=params, timeout=timeout) as response:
                    if response.status_code != 200:
                        response.read()
                        self._decoded(response, what)
                    for line in response.iter_lines():
                        found.append(line)
                        if time.monotonic() >= deadline:
                            break
            except httpx2.ReadTimeout:
                return found
            return found

        return list(self._patiently(read, what))

    def hide(self, text: str) -> str:
        """Return text without secrets."""
        for secret in (self.key, *self.secrets):
            if len(secret) >= 4:
                text = text.replace(secret, "***")
        return redact(text)

    def _patiently(
        self, send: Callable[[httpx2.Client], Any], what: str, *, creating: bool = False, keyless: bool = False
    ) -> Any:
        wait = self.patience.first_wait
        for attempt in range(1, self.patience.tries + 1):
            try:
                with self._client(what, keyless=keyless) as client:
                    return send(client)
            except CloudError as error:
                if not error.passing or (creating and error.uncertain) or attempt == self.patience.tries:
                    raise
                pause = error.asked_wait
                if pause is None:
                    pause = min(wait, self.patience.longest_wait) * random.uniform(0.5, 1.0)
                if pause > _LONGEST_ASKED:
                    raise
                self.say(f"{error}; trying again in {pause:.0f} s ({attempt} of {self.patience.tries - 1})")
                time.sleep(pause)
                wait *= 2
        raise AssertionError("unreachable")

    @contextmanager
    def _client(self, what: str, *, keyless: bool) -> Iterator[httpx2.Client]:
        """Yield a client whose failures of transport are said in plain words."""
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
            ) from None  # the cause may quote an address with a signature
        except (httpx2.InvalidURL, httpx2.DecodingError) as error:
            said = f"{self.platform} answers nonsense for {what} ({type(error).__name__})"
            raise CloudError(said, uncertain=isinstance(error, httpx2.DecodingError)) from None

    def _decoded(self, response: httpx2.Response, what: str) -> Any:
        status = response.status_code
        try:
            body = response.json() if response.content else None
        except ValueError:
            body = None
            if 200 <= status < 300:
                # It was done: only the answer cannot be read.
                said = f"{self.platform} answers no JSON for {what}"
                raise CloudError(said, status=status, passing=True, uncertain=True) from None
        refused = isinstance(body, dict) and body.get("success") is False
        if 200 <= status < 300 and not refused:
            return body
        raise self._failure(response, body if isinstance(body, dict) else {}, what)

    def _failure(self, response: httpx2.Response, body: Mapping[str, Any], what: str) -> CloudError:
        """Return the failure that an answer stands for."""
        status = response.status_code
        reason = str(body.get("error") or body.get("title") or "")
        detail = self._detail(response, body)
        said = f"{self.platform} answers {status} for {what}" + (f": {detail}" if detail else "")
        if status == 402 or "insufficient_credit" in reason:
            return NoMoneyError(said, remedy="add credit to the account", status=status, reason=reason)
        if status in (401, 403):
            remedy = f"check {self.key_name} and what it may do"
            return KeyRefusedError(said, remedy=remedy, status=status, reason=reason)
        if status in (404, 410):
            return GoneError(said, status=status, reason=reason)
        passing = (status in _TRANSIENT or status >= 500) and reason != "search_quota_exceeded"
        # After these nobody knows whether a request that creates something has done so.
        uncertain = status == 408 or status >= 500
        error = CloudError(said, status=status, reason=reason, passing=passing, uncertain=uncertain)
        asked = response.headers.get("Retry-After", "")
        # One platform says it in a header, the other in words.
        threshold = re.search(r"threshold=(\d+(?:\.\d+)?)", detail)
        if re.fullmatch(r"\d+(\.\d+)?", asked):
            error.asked_wait = float(asked)
        elif status == 429 and threshold:
            error.asked_wait = float(threshold[1])
        return error

    def _detail(self, response: httpx2.Response, body: Mapping[str, Any]) -> str:
        parts = [str(body[name]) for name in ("msg", "message", "detail", "error") if body.get(name)][:1]
        parts += [str(error) for error in body.get("errors") or []]
        text = "; ".join(parts) if body else response.text
        return self.hide(" ".join(text.split()))[:_DETAIL_CHARACTERS]
