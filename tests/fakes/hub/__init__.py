"""A hub on the loopback interface, for the real clients of the Hugging Face Hub.

It keeps models and datasets with their commits and serves reads and writes as the real hub does. It injects faults on
request, and logs all requests and the bytes transferred. It makes no connections.
"""

from __future__ import annotations

import atexit
import hmac
import itertools
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self
from urllib.parse import quote

from tests.fakes.hub import lfs
from tests.fakes.hub.api import Api
from tests.fakes.hub.faults import Faults, Request, Rule
from tests.fakes.hub.server import Server
from tests.fakes.hub.store import Blobs, Commit, Repo, Source, Token, now

__all__ = ["Commit", "LoopbackHub", "Repo", "Request", "Rule", "Token"]

MEBIBYTE = 1 << 20
# The port and the clients' home of hubs that follow one another under one address.
_PORTS: list[int] = []
_HOMES: list[Path] = []


class LoopbackHub:
    """A hub that runs from its construction until it is closed.

    Args:
        lfs_threshold: Text files larger than this are LFS files, bytes; binary ones always are.
        chunk_size: LFS files larger than this are uploaded in parts of this size, bytes.
        page_size: Entries per page of a listing; None: as the real hub.
        usual: At the address of the former such hub, if that is closed, and with one home for all its clients: commands
            at all these hubs fork from one process, which has loaded transformers for that address and home.
    """

    def __init__(
        self,
        *,
        lfs_threshold: int = 10 * MEBIBYTE,
        chunk_size: int = 16 * MEBIBYTE,
        page_size: int | None = None,
        usual: bool = False,
    ) -> None:
        self.chunk_size = chunk_size
        self.page_size = page_size
        self.started = now()
        self.closing = threading.Event()
        self.faults = Faults()
        # Tracebacks of this server itself: a test of a client should find none.
        self.errors: list[str] = []
        # Other hosts that a client requested while using this hub as its proxy.
        self.strays: list[str] = []
        self._lock = threading.RLock()
        self._requests: list[Request] = []
        self._repos: dict[tuple[str, str], Repo] = {}
        self._tokens: dict[str, Token] = {}
        self._ids = itertools.count(1)
        self._secret = secrets.token_bytes(16)
        self._folder = Path(tempfile.mkdtemp(prefix="loopback-hub-"))
        self.blobs = Blobs(self._folder, lfs_threshold)
        self._usual = usual
        self._server = _at_usual_port(self) if usual else Server(self, Api(self).answer)
        # As in reality, the storage is another origin, so clients treat redirects to it accordingly.
        self._storage = Server(self, lambda call: lfs.storage(self, call))
        self._storage_netloc = self._storage.netloc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closing.set()
        self._server.close()
        self._storage.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def endpoint(self) -> str:
        return f"http://{self._server.netloc}"

    @property
    def storage_address(self) -> tuple[str, int]:
        """Host and port of the storage, for a proxy in front of it."""
        return "127.0.0.1", self._storage.server_port

    def reach_storage_at(self, url: str) -> None:
        """Send clients to the storage through a proxy at this URL from now on."""
        self._storage_netloc = url.removeprefix("http://")

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return variables that direct clients in another process to this hub alone.

        This hub is also their proxy for every other host, and only records it in `strays`. So calls of `datasets` to
        its viewer (at a name made from the endpoint) fail without even a DNS lookup.
        """
        home = _as_usual(home) if self._usual else home
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), self.endpoint)
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_TOKEN": token or "",
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            **proxies,
            **{name.lower(): value for name, value in proxies.items()},
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    # Contents of the hub

    def add_model(
        self, repo_id: str, files: Mapping[str, Source] | Path, *, private: bool = False, gated: bool | str = False
    ) -> Repo:
        return self.create("model", repo_id, files, private=private, gated=gated)

    def add_dataset(
        self, repo_id: str, files: Mapping[str, Source] | Path, *, private: bool = False, gated: bool | str = False
    ) -> Repo:
        return self.create("dataset", repo_id, files, private=private, gated=gated)

    def create(
        self,
        kind: str,
        repo_id: str,
        files: Mapping[str, Source] | Path,
        *,
        private: bool = False,
        gated: bool | str = False,
        author: str = "",
    ) -> Repo:
        """Add a repository with one commit; the files are contents or paths by name, or a folder."""
        if isinstance(files, Path):
            folder = files
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        repo = Repo(kind, repo_id, self.blobs, private, gated)
        with self._lock:
            if (kind, repo_id) in self._repos:
                raise FileExistsError(repo_id)
            repo.commit(files, "initial commit", author=author)
            self._repos[kind, repo_id] = repo
        return repo

    def remove(self, repo: Repo) -> None:
        with self._lock:
            self._repos.pop((repo.kind, repo.id), None)

    def repo(self, kind: str, repo_id: str) -> Repo:
        """Return the "model" or "dataset" of this name."""
        repo = self.find_repo(kind, repo_id)
        if repo is None:
            raise KeyError(f"{kind} {repo_id}")
        return repo

    def find_repo(self, kind: str, repo_id: str) -> Repo | None:
        with self._lock:
            return self._repos.get((kind, repo_id))

    def repos(self) -> list[Repo]:
        with self._lock:
            return list(self._repos.values())

    def add_token(
        self,
        value: str,
        user: str,
        *,
        role: str = "write",
        namespaces: Mapping[str, str] | Iterable[str] = (),
        gated: Iterable[str] = (),
    ) -> Token:
        """Add a token, and return it.

        Args:
            value: The token itself.
            user: Its owner.
            role: "read", "write" or "fine-grained".
            namespaces: For a fine-grained token its only rights, "read" or "write" by namespace or by repository; for
                others
            the user's organizations.
            gated: Gated repositories that grant this user access.
        """
        if role not in ("read", "write", "fine-grained"):
            raise ValueError(role)
        rights = dict(namespaces) if isinstance(namespaces, Mapping) else dict.fromkeys(namespaces, role)
        token = Token(value, user, role, rights, frozenset(gated))
        with self._lock:
            self._tokens[value] = token
        return token

    def revoke(self, value: str) -> None:
        with self._lock:
            del self._tokens[value]

    def find_token(self, value: str) -> Token | None:
        with self._lock:
            return self._tokens.get(value)

    # Faults

    def fail(
        self,
        method: str,
        path_glob: str,
        *,
        status: int = 503,
        headers: Mapping[str, str] | None = None,
        message: str = "The kitchen is closed.",
        times: int | None = 1,
        skip: int = 0,
    ) -> Rule:
        """Answer matching requests with an error, `times` of them (None: all), after letting `skip` pass."""
        headers = dict(headers or {})
        return self.faults.add(
            Rule("fail", method, path_glob, times, skip, status=status, headers=headers, message=message)
        )

    def cut(
        self, path_glob: str, *, after_bytes: int = 0, times: int | None = 1, skip: int = 0, method: str = "*"
    ) -> Rule:
        """Close the connection in the middle: of the content that a GET sends, or of the body of a POST or a PUT.

        Bodies up to `after_bytes` pass and do not use up the rule. Large files are sent from
        "/cdn/models/user/name/SHA256/path" and received at "/upload/models/user/name/SHA256[/PART]".
        """
        return self.faults.add(Rule("cut", method, path_glob, times, skip, after_bytes=after_bytes))

    def drop(self, method: str, path_glob: str, *, times: int | None = 1, skip: int = 0) -> Rule:
        """Carry out the request, then close the connection instead of answering."""
        return self.faults.add(Rule("drop", method, path_glob, times, skip))

    def delay(self, method: str, path_glob: str, *, seconds: float, times: int | None = None, skip: int = 0) -> Rule:
        return self.faults.add(Rule("delay", method, path_glob, times, skip, seconds=seconds))

    # Request log

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in order of arrival."""
        with self._lock:
            return list(self._requests)

    def asked(self, method: str, path_glob: str = "*") -> list[Request]:
        """Return the requests with this method ("*" for any) to these paths."""
        return [request for request in self.requests if request.matches(method, path_glob)]

    def bytes_sent(self, path_glob: str = "*") -> int:
        """Return the bytes of files and other response bodies sent for these paths."""
        return sum(request.sent for request in self.asked("*", path_glob))

    def bytes_received(self, path_glob: str = "*") -> int:
        return sum(request.received for request in self.asked("*", path_glob))

    def forget(self) -> None:
        with self._lock:
            self._requests.clear()
            self.strays.clear()

    # For the servers

    def log(self, request: Request) -> None:
        with self._lock:
            self._requests.append(request)

    def is_stray(self, host: str) -> bool:
        if host in (self._server.netloc, self._storage.netloc, self._storage_netloc):
            return False
        with self._lock:
            self.strays.append(host)
        return True

    def next_request_id(self) -> str:
        return f"Root=1-{next(self._ids):08x}"

    def signature(self, path: str) -> str:
        return hmac.new(self._secret, path.encode(), "sha256").hexdigest()[:32]

    def signed(self, origin: str, path: str) -> str:
        return f"{origin}{quote(path)}?signature={self.signature(path)}"

    def cdn_url(self, path: str) -> str:
        return self.signed(f"http://{self._storage_netloc}", path)

    def parts(self, key: str) -> Path:
        folder = self._folder / "parts" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _at_usual_port(hub: LoopbackHub) -> Server:
    try:
        made = Server(hub, Api(hub).answer, _PORTS[0] if _PORTS else 0)
    except OSError:  # the former hub is still there
        made = Server(hub, Api(hub).answer)
    _PORTS[:] = _PORTS or [made.server_port]
    return made


def _as_usual(home: Path) -> Path:
    """Return a link to this home, by the same name for every home of this process."""
    if not _HOMES:
        folder = Path(tempfile.mkdtemp(prefix="hub-clients-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _HOMES.append(folder / "home")
    home.mkdir(parents=True, exist_ok=True)
    _HOMES[0].unlink(missing_ok=True)
    _HOMES[0].symlink_to(home)
    return _HOMES[0]
