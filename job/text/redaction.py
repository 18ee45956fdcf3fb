"""Redaction of secrets: the only path of every log, record, report and error line.

Secrets are the values of environment variables with telling names, passwords in URLs in any variable, values given to
`remember`, and tokens recognised by their format. They are found in every encoding: plain, escaped for JSON, Python,
HTML or shells, URL-encoded, base64, hexadecimal, UTF-16.
"""

from __future__ import annotations

import base64
import errno
import functools
import html
import json
import os
import re
import shlex
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO, cast
from urllib.parse import quote, quote_plus, unquote

from job.errors import MachineError

MASK = "***"
# What steers a terminal: escapes, control characters, and marks that turn the direction of text. Colours and the
# moves of a live line pass in what this program prints itself.
_STEERING = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_NOT_OURS = re.compile(rf"(?!\x1b\[[0-9;?]*[A-Za-z]){_STEERING.pattern}")
# Errors of output whose terminal is closed, or whose reader has seen enough, as `head` has.
_NOT_READ = frozenset({errno.EIO, errno.EPIPE})
# Shorter values ("1", "true", "admin") are switches and words; masking them would garble every text.
MIN_LENGTH = 8
# No place that a secret is known by is shorter: `?sig=x`.
_SHORTEST_PLACE = 6
# A value of one character class and fewer than 17 characters may be a word ("postgres"): masked as a whole word only.
_WORD = re.compile(r"[A-Z]?[a-z]{1,15}|[A-Z]{1,15}|[0-9]{1,15}")
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|KEYS?(?![A-Z])|(?<![A-Z])PAT(?![A-Z])", re.IGNORECASE
)
# Start of a word, also right after an escape of JSON or a URL.
_BEGIN = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt])|(?<=%[0-9A-Fa-f]{2})|(?<=\\u[0-9A-Fa-f]{4}))"
_END = r"(?![A-Za-z0-9])"
# Tokens by their issuers' formats: Hugging Face, AWS, RunPod, GitHub, OpenAI and the like, JSON web tokens, PEM keys.
_TOKENS = re.compile(
    rf"{_BEGIN}(?:hf_[a-z]{{1,20}}_(?=[a-z_]{{0,40}}[A-Z0-9])[A-Za-z0-9._~+/-]{{16,}}=*|hf_[A-Za-z0-9]{{16,}}|(?:AKIA|ASIA)[A-Z0-9]{{16}}{_END}"
    r"|rpa_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|sk-[A-Za-z0-9_-]{20,}"
    r"|eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]*)"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
# Context of a secret, kept, and the secret: in URLs, query strings, connection strings and headers.
_PLACES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"((?<![A-Za-z0-9])[a-z][a-z0-9+.-]{0,20}://[^\s/:@\"'<>?#]{0,200}:)[^\s/@\"'<>]+(?=@)",
        r"((?<![A-Za-z0-9])[a-z][a-z0-9+.-]{0,20}://)[^\s/:@\"'<>?#]{16,}(?=@)",
        r"(%3A%2F%2F[^\s%\"'<>]*%3A)(?:(?!%40|%2F)[^\s\"'<>])+(?=%40)",
        r"([?&;](?:[\w.-]{0,60}(?:token|secret|password|passwd|signature|credential|api_?key|access_?key(?:id)?)|sig)=)"
        r"[^\s&;\"'<>]+",
        r"((?<![A-Za-z0-9])(?:password|passwd)\s?=\s?)[^\s&;,\"'<>]+",
        r"(aws_secret_access_key[\"']?\s*[:=]\s*[\"']?)[A-Za-z0-9/+]{40}",
        r"((?<![A-Za-z0-9])(?:bearer|basic)\s+)(?=\S*[0-9=+/_])[A-Za-z0-9._~+/-]{16,}=*",
    )
)
# In a variable's value; an unencoded password may contain "/" and "@", a port is followed by a path.
_ADDRESS_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@]*:(?!\d+/)(.+)@")

_remembered: set[str] = set()
_latest: tuple[dict[Any, Any], frozenset[str], _Masks] | None = None  # variables, `_remembered` and their masks
_lock = threading.Lock()


def looks_secret(name: str) -> bool:
    """Return whether an environment variable with this name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def remember(*values: str | None) -> None:
    """Mask these values from now on: credentials from files."""
    with _lock:
        _remembered.update(value for value in values if value)


def redact(text: str) -> str:
    """Replace every secret in a text by `***`."""
    # Most of a report's texts are numbers and marks, too short to hold any.
    return text if len(text) < _SHORTEST_PLACE else _masks().text(text)


def redacted(value: Any) -> Any:
    """Redact the texts and keys of a JSON value; other objects become redacted text."""
    return _masked_value(value, _masks())


def redacted_json(value: Any, *, indent: int | None = None, ascii_only: bool = True) -> str:
    """Return a value as JSON, redacted before escaping."""
    return json.dumps(redacted(value), indent=indent, ensure_ascii=ascii_only)


def unsteered(text: str) -> str:
    """Remove what would steer a terminal from a text of others, such as a model's response or a machine's log."""
    return _STEERING.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def holds_secret(text: str) -> bool:
    """Return whether a text holds a certain secret, ignoring words that may be none."""
    return _masks().key(text) != text


def _masked_value(value: Any, masks: _Masks) -> Any:
    if isinstance(value, str):
        return masks.text(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {masks.key(str(key)): _masked_value(part, masks) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_masked_value(part, masks) for part in value]
    return masks.text(str(value))


class _Masks:
    """Masks the secrets of one environment."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._forms, words = _forms_of(secrets)
        self._words = re.compile(f"{_BEGIN}(?:{'|'.join(map(re.escape, words))}){_END}") if words else None

    def text(self, text: str) -> str:
        return self.key(text if self._words is None else self._words.sub(MASK, text))

    def key(self, text: str) -> str:
        """Redact a field's name; words that are secrets elsewhere are kept."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, MASK)
        text = _TOKENS.sub(MASK, text)
        for place in _PLACES:
            text = place.sub(rf"\1{MASK}", text)
        return text


def _masks() -> _Masks:
    # The environment may change during the process: a client sets a variable, a test another one.
    global _latest
    with _lock:
        # As CPython keeps them: a report asks for thousands of values, and decoding all variables takes 50 µs.
        variables = getattr(os.environ, "_data", os.environ)
        if _latest is None or _latest[0] != variables or _latest[1] != _remembered:
            before = dict(variables)  # first: a change meanwhile is noticed by the next call
            remembered = frozenset(_remembered)
            _latest = before, remembered, _build_masks(tuple(os.environ.items()), remembered)
        return _latest[2]


@functools.lru_cache(maxsize=4)
def _build_masks(environment: tuple[tuple[str, str], ...], remembered: frozenset[str]) -> _Masks:
    return _Masks({*_secrets_in(environment), *remembered})


def _secrets_in(environment: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield an environment's secrets: values by name, and passwords in URLs."""
    for name, value in environment:
        # The path of a secret's file is no secret, and would mask neighbouring paths.
        if looks_secret(name) and not (value.startswith("/") and os.path.exists(value)):
            yield value
        address = _ADDRESS_PASSWORD.match(value.strip())
        if address is not None:
            yield from (address[1], unquote(address[1]))


def _forms_of(secrets: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return two lists, longest first: strings to mask anywhere, and strings to mask only as whole words."""
    forms: set[str] = set()
    words: set[str] = set()
    for secret in secrets:
        # Messages are joined into one line, and tracebacks are split into lines.
        for value in {secret, secret.strip(), " ".join(secret.split()), *map(str.strip, secret.splitlines())}:
            if len(value) < MIN_LENGTH:
                continue
            if _WORD.fullmatch(value):
                words.add(value)
                forms.update(form for form in _encoded(value) if form != value)
            else:
                forms.update((value, *_encoded(value)))
    return sorted(forms, key=len, reverse=True), sorted(words, key=len, reverse=True)


def _encoded(secret: str) -> Iterator[str]:
    data = secret.encode("utf-8", "surrogateescape")
    for escaped in (json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret)):
        yield escaped[1:-1]
    yield shlex.quote(secret)
    for quoted in (quote(data, safe=""), quote(data), quote_plus(data)):
        yield quoted
        yield re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), quoted)
    for shown in (html.escape(secret), html.escape(secret, quote=False)):
        yield shown
        yield shown.replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
    yield data.hex()
    yield data.hex().upper()
    yield from _base64(data)
    for codec in ("utf-16-le", "utf-16-be"):
        wide = secret.encode(codec, "surrogatepass")
        yield from _base64(wide)
        # Misread as single-byte text, and then escaped.
        yield wide.decode("latin-1").strip("\0")
    for zero in ("\\u0000", "\\x00", "%00"):
        yield zero.join(secret)


def _base64(data: bytes) -> Iterator[str]:
    """Yield the part of a secret's base64 that is independent of its surroundings, for each alignment."""
    for before in range(3):
        found = base64.b64encode(b"\0" * before + data).decode()
        first = (0, 2, 3)[before]
        # An incomplete last group depends on what follows.
        last = (len(data) + before) // 3 * 4 + (0, 1, 2)[(len(data) + before) % 3]
        if last - first >= MIN_LENGTH:
            yield found[first:last]
            yield found[first:last].translate({ord("+"): "-", ord("/"): "_"})


class _Guarded:
    """Redacts everything written to a stream, and lets only our own escapes reach it.

    It outlives its terminal, reader and disk (`gone`: output is discarded).
    """

    def __init__(self, stream: TextIO, *, holds_results: bool) -> None:
        self._stream, self._holds_results = stream, holds_results
        self._write_error: OSError | None = None
        self.gone = False

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"a text is written here, not {type(text).__name__}")
        with self._outlived():
            self._stream.write(_NOT_OURS.sub("", redact(text)))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered. Raises MachineError once where results were lost, also in a former write."""
        with self._outlived():
            self._stream.flush()
        if (lost := self._write_error) is not None:
            self._write_error = None
            raise MachineError(f"cannot write the output: {lost.strerror or lost}", remedy="free space where it goes")

    @contextmanager
    def _outlived(self) -> Iterator[None]:
        """Discard all output from the first failure on: that is no reason to lose a job."""
        try:
            yield
        except OSError as error:
            self.gone = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if self._holds_results and error.errno not in _NOT_READ:
                self._write_error = error

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_gone(stream: TextIO) -> bool:
    """Return whether what is written to a stream of `guarded_output` arrives nowhere, as behind `head`."""
    return bool(getattr(stream, "gone", False))


@contextmanager
def guarded_output() -> Iterator[None]:
    """Redact everything that this process prints in the block, including libraries, warnings and threads.

    Of escape sequences, only those of colours and live lines reach the terminal.
    """
    before = sys.stdout, sys.stderr
    # Without a console there is no stream.
    guarded = [
        cast(TextIO, _Guarded(stream, holds_results=stream is before[0]) if stream else stream) for stream in before
    ]
    sys.stdout, sys.stderr = guarded
    try:
        yield
    finally:
        # A stream replaced meanwhile is kept.
        if sys.stdout is guarded[0]:
            sys.stdout = before[0]
        if sys.stderr is guarded[1]:
            sys.stderr = before[1]
