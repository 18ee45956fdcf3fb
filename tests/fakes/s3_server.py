"""A real S3 server on the loopback (moto's) behind a front that injects faults into single requests.

The front adds what moto lacks: NoSuchUpload for parts and completions of unknown uploads (moto: 500), and atomic
conditional puts (moto checks and writes in two steps). Rules of tests add SlowDown and Retry-After. Not covered:
comparing checksums and MD5 with the received data, IfMatch of completions, checksums in the list of parts, conflicts of
simultaneous writers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from io import BytesIO
from math import inf
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import parse_qs

import boto3
from botocore.config import Config
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import FakeBucket, s3_backends
from moto.server import ThreadedMotoServer

from job.records import Manifest, ManifestEntry
from job.storage.atomic import write_record

BUCKET = "results"
# All objects stay in memory, for `S3Server.contents`: moto moves larger ones than this to files.
os.environ["MOTO_S3_DEFAULT_KEY_BUFFER_SIZE"] = str(1 << 40)
# Made once: a session reads large service descriptions.
_SESSION = boto3.session.Session()
KEY_ID, SECRET = "AKIAEXAMPLEEXAMPLE00", "averysecretsecretaccesskeyforthetests0000"


@dataclass(frozen=True)
class Request:
    """A request that has reached the server."""

    method: str
    key: str
    query: dict[str, list[str]]
    headers: dict[str, str]

    @property
    def operation(self) -> str:
        """Short name: GET, HEAD, PUT, DELETE, create, part, parts, complete, abort, uploads."""
        if "uploadId" in self.query:
            return {"PUT": "part", "GET": "parts", "POST": "complete", "DELETE": "abort"}[self.method]
        if "uploads" in self.query:
            return "create" if self.method == "POST" else "uploads"
        return self.method


@dataclass(frozen=True)
class Answer:
    """The front's answer instead of the server's."""

    status: str
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    passed_on: bool = False

    @property
    def body(self) -> bytes:
        return f"<?xml version='1.0'?><Error><Code>{self.code}</Code><Message>made up</Message></Error>".encode()


# A rule may change the request (its WSGI environment) and may answer in the server's place.
Rule = Callable[[Request, dict[str, Any]], Answer | None]


class Front:
    """WSGI middleware.

    Attributes:
        rules: The faults.
        hidden_headers: Prefixes of header names to remove from responses.
        requests: All requests received.
        given: Key and bytes of all downloads.
        idle: Notified when a request ends; ``under_way`` counts those that have not.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self.rules: list[Rule] = []
        self.hidden_headers: tuple[str, ...] = ()
        # The ETag of a multipart object is not derived from its parts, as with rclone's server.
        self.own_part_etags = False
        self.requests: list[Request] = []
        self.given: list[tuple[str, int]] = []
        self._one_put = threading.Lock()
        self.idle = threading.Condition()
        self.under_way = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self.idle:
            self.under_way += 1
        try:
            return self._answered(environ, start_response)
        finally:
            with self.idle:
                self.under_way -= 1
                self.idle.notify_all()

    def _answered(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:  # noqa: C901 - a fault after the other
        request = _described(environ)
        if not request.key.startswith("moto-api"):
            self.requests.append(request)
        for rule in [*self.rules, _forgotten]:
            answer = rule(request, environ)
            if answer is not None and answer.passed_on:
                list(self._app(environ, lambda *_: None))
            if answer is not None:
                if not answer.passed_on:
                    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                body = b"" if request.method == "HEAD" else answer.body
                start_response(answer.status, [*answer.headers.items(), ("Content-Length", str(len(body)))])
                return [body]

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            if request.operation == "GET" and status.startswith("2"):
                self.given.append((request.key, int(dict(headers).get("Content-Length", 0))))
            if self.hidden_headers:
                headers = [(name, value) for name, value in headers if not name.lower().startswith(self.hidden_headers)]
            if self.own_part_etags:
                headers = [(name, re.sub(r"-\d+(?=\"?$)", "", v) if name == "ETag" else v) for name, v in headers]
            return start_response(status, headers, *rest)

        if request.operation == "PUT" and {"if-match", "if-none-match"} & request.headers.keys():
            # Read first: a slow client must not block the others.
            environ["wsgi.input"] = BytesIO(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
            with self._one_put:
                return list(self._app(environ, start))
        return self._app(environ, start)  # type: ignore[no-any-return]


def _forgotten(request: Request, _environ: dict[str, Any]) -> Answer | None:
    if request.operation not in ("part", "complete"):
        return None
    bucket = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets.get(BUCKET)
    upload = request.query["uploadId"][0]
    there = bucket.keys.get(request.key) if bucket else None
    completed = there is not None and there.multipart is not None and there.multipart.id == upload
    if bucket is None or completed or upload in bucket.multiparts:
        return None
    return Answer("404 Not Found", "NoSuchUpload")


def _described(environ: dict[str, Any]) -> Request:
    headers = {name[5:].lower().replace("_", "-"): str(v) for name, v in environ.items() if name.startswith("HTTP_")}
    query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    key = environ.get("PATH_INFO", "").removeprefix(f"/{BUCKET}").lstrip("/")
    return Request(environ["REQUEST_METHOD"], key, query, headers)


class S3Server:
    """The server with its bucket; a context manager."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)

    def __enter__(self) -> S3Server:
        self._moto.start()
        self.host, self.port = self._moto.get_host_and_port()
        assert self._moto._server is not None
        self.front = Front(self._moto._server.app)
        self._moto._server.app = self.front
        return self

    def __exit__(self, *_: object) -> None:
        # All servers of a process share their contents.
        self.reset()
        self._moto.stop()
        assert self._moto._server is not None
        self._moto._server.server_close()

    def reset(self) -> None:
        """Forget faults and contents once no request is under way.

        Requests of a process that a test has killed are still worked on: a part that is stored while moto forgets
        breaks that, and an upload that is created afterwards would be the next test's.
        """
        self.front.rules.clear()
        self.front.hidden_headers = ()
        self.front.own_part_etags = False
        with self.front.idle:
            assert self.front.idle.wait_for(lambda: not self.front.under_way, 60), "a request did not end"
        self.require_permissions(after=inf)
        self._control("reset")

    def written_earlier(self, key: str, seconds: float) -> None:
        """Change when an object was written by the server's clock."""
        found = self._bucket.keys[key]
        found.last_modified -= timedelta(seconds=seconds)

    def require_permissions(self, after: float) -> None:
        """Check permissions after this many more requests."""
        self._control("reset-auth", str(after).encode())

    def _control(self, action: str, body: bytes = b"") -> None:
        request = urllib.request.Request(f"{self.url}/moto-api/{action}", body, {"Content-Type": "text/plain"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def client(self, service: str = "s3", key_id: str = KEY_ID, secret: str = SECRET) -> Any:
        """Return a separate client, to inspect and tamper."""
        return _SESSION.client(
            service,
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=key_id,
            aws_secret_access_key=secret,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def contents(self, prefix: str = "") -> dict[str, bytes]:
        """Return objects by key, read from the server's memory: no request, which a test might count or forbid."""
        found = {key: self._value(key) for key in sorted(dict(self._bucket.keys)) if key.startswith(prefix)}
        return {key: value for key, value in found.items() if value is not None}

    def _value(self, key: str) -> bytes | None:
        """Return an object's bytes, or None if it is deleted meanwhile: requests may be under way."""
        while (item := self._bucket.keys.get(key)) is not None:
            try:
                # Moves no position in the buffer, unlike ``item.value``: moto reads there without a lock.
                return bytes(item._value_buffer._file.getvalue())
            except ValueError:
                time.sleep(0.001)  # moto closes the buffer of an object before it replaces or removes that
        return None

    def uploads(self) -> list[tuple[str, str]]:
        """Return key and id of each multipart upload that is neither completed nor aborted."""
        return [(upload.key_name, number) for number, upload in dict(self._bucket.multiparts).items()]

    @property
    def _bucket(self) -> FakeBucket:
        return s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET]

    def operations(self) -> list[str]:
        """Return the operations so far, in order."""
        return [request.operation for request in self.front.requests]


def make_export(folder: Path, sizes: dict[str, int], seed: int = 0) -> Path:
    """Write an export of random files of these sizes in bytes."""
    folder.mkdir(parents=True)
    random = Random(seed)
    files = {}
    for name, size in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for start in range(0, size, 1 << 20):
                block = random.randbytes(min(1 << 20, size - start))
                digest.update(block)
                file.write(block)
        files[name] = ManifestEntry(sha256=digest.hexdigest(), size=size)
    write_record(folder / "manifest.json", Manifest(files=files))
    return folder


def policy(*actions: str) -> str:
    statement = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})
