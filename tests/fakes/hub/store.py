"""The hub's data: file contents on disk, commits, repositories, pull requests and tokens."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

CHUNK = 1 << 16
SAMPLE = 512
# LFS patterns in the .gitattributes of a new repository on the real hub.
LFS_NAMES = (
    "7z arrow avro bin bz2 ckpt ftz gguf gz h5 joblib lz4 mds mlmodel model msgpack npy npz onnx ot parquet pb "
    "pickle pkl pt pth rar safetensors tar tflite tgz wasm xz zip zst"
)
LFS_SUFFIXES = frozenset(f".{name}" for name in LFS_NAMES.split())
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES)).encode()

Source = bytes | Path


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def read_chunks(path: Path, start: int = 0, length: int | None = None) -> Iterator[bytes]:
    """Yield a part of a file in chunks, so that memory never holds a whole file."""
    left = path.stat().st_size - start if length is None else length
    with path.open("rb") as file:
        file.seek(start)
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk


def git_oid(size: int, chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Blob:
    """The content of one file, stored in git directly or as an LFS pointer."""

    file: Path
    size: int
    sha256: str
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def read(self) -> bytes:
        return self.file.read_bytes()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Blobs:
    """Contents on disk, one file per sha256."""

    def __init__(self, folder: Path, lfs_threshold: int) -> None:
        self.lfs_threshold = lfs_threshold
        self._kept = folder / "kept"
        self._incoming = folder / "incoming"
        self._kept.mkdir()
        self._incoming.mkdir()

    def is_lfs(self, path: str, size: int, sample: bytes) -> bool:
        """Return whether the real hub would use LFS: by name, by size, or because the content is not text."""
        return size > 0 and (Path(path).suffix in LFS_SUFFIXES or size > self.lfs_threshold or b"\0" in sample)

    def receive(self, chunks: Iterable[bytes]) -> tuple[Path, str, int]:
        """Write chunks to a new file, and return it with its sha256 and its size."""
        incoming = self._incoming / secrets.token_hex(8)
        digest = hashlib.sha256()
        size = 0
        try:
            with incoming.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
        except BaseException:
            incoming.unlink()
            raise
        return incoming, digest.hexdigest(), size

    def keep(self, incoming: Path, sha256: str) -> None:
        os.replace(incoming, self._kept / sha256)

    def lfs(self, sha256: str) -> Blob:
        size = (self._kept / sha256).stat().st_size
        text = pointer(sha256, size)
        return Blob(self._kept / sha256, size, sha256, git_oid(len(text), [text]), lfs=True)

    def regular(self, sha256: str) -> Blob:
        file = self._kept / sha256
        size = file.stat().st_size
        return Blob(file, size, sha256, git_oid(size, read_chunks(file)), lfs=False)

    def put(self, path: str, source: Source) -> Blob:
        """Store a test's content, as the real hub would under this path."""
        chunks = [source] if isinstance(source, bytes) else read_chunks(source)
        incoming, sha256, size = self.receive(chunks)
        sample = next(read_chunks(incoming, 0, SAMPLE), b"")
        self.keep(incoming, sha256)
        return self.lfs(sha256) if self.is_lfs(path, size, sample) else self.regular(sha256)


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    message: str
    author: str
    date: str
    parent: str | None
    files: Mapping[str, Blob]


@dataclass
class Pull:
    """A pull request, or a plain discussion when it has no base."""

    num: int
    title: str
    author: str
    base: str | None
    status: str = "open"
    created: str = field(default_factory=now)
    merged: str | None = None
    events: list[dict[str, object]] = field(default_factory=list)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"

    def note(self, kind: str, author: str, data: dict[str, object]) -> dict[str, object]:
        event = {
            "id": secrets.token_hex(12),
            "type": kind,
            "createdAt": now(),
            "author": {"name": author},
            "data": data,
        }
        self.events.append(event)
        return event


class ConflictError(Exception):
    """A commit or a merge conflicts with the current branch."""


@dataclass
class Repo:
    """A model or a dataset: files by commit, branches, tags and pull requests."""

    kind: str  # "model" or "dataset"
    id: str
    blobs: Blobs
    private: bool = False
    gated: bool | str = False
    created: str = field(default_factory=now)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)
    # sha256 of the LFS contents that this repository has received; commits may name only these
    lfs: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def web_path(self) -> str:
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    @property
    def sha(self) -> str:
        return self.branches["main"]

    def find(self, revision: str) -> Commit | None:
        """Return the commit of a branch, tag, pull request or (short) hash."""
        with self.lock:
            name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
            sha = self.branches.get(name) or self.tags.get(name)
            if sha is None and len(name) >= 7:
                sha = next((known for known in self.commits if known.startswith(name)), None)
            return None if sha is None else self.commits[sha]

    def at(self, revision: str = "main") -> Commit:
        commit = self.find(revision)
        if commit is None:
            raise KeyError(revision)
        return commit

    def paths(self, revision: str = "main") -> list[str]:
        return sorted(self.at(revision).files)

    def read(self, path: str, revision: str = "main") -> bytes:
        return self.at(revision).files[path].read()

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits of a revision, the last one first."""
        commits = []
        commit = self.find(revision)
        while commit is not None:
            commits.append(commit)
            commit = None if commit.parent is None else self.commits[commit.parent]
        return commits

    def commit(
        self, files: Mapping[str, Source | None], title: str = "Update files", *, branch: str = "main", author: str = ""
    ) -> Commit:
        """Commit as another user would, past the server; None deletes a file."""
        changes = {path: None if source is None else self.blobs.put(path, source) for path, source in files.items()}
        self.lfs.update(blob.sha256 for blob in changes.values() if blob is not None and blob.lfs)
        return self.push(branch, changes, title, "", author)

    def push(
        self,
        branch: str,
        changes: Mapping[str, Blob | None],
        title: str,
        message: str,
        author: str,
        parent: str | None = None,
    ) -> Commit:
        """Add a commit to a branch; a given parent must be the branch's head."""
        with self.lock:
            head = self.branches.get(branch)
            if parent is not None and (head is None or not head.startswith(parent)):
                raise ConflictError("A commit has happened since. Please refresh and try again.")
            files = dict(self.commits[head].files) if head else {}
            for path, blob in changes.items():
                if blob is None:
                    files.pop(path, None)
                else:
                    files[path] = blob
            listing = sorted((path, blob.oid, blob.sha256) for path, blob in files.items())
            identity = json.dumps([self.kind, self.id, self.created, head, title, message, author, listing])
            sha = hashlib.sha1(identity.encode()).hexdigest()
            commit = Commit(sha, title, message, author or self.namespace, now(), head, files)
            self.commits[sha] = commit
            self.branches[branch] = sha
            return commit

    def squash(self, branch: str, message: str, author: str) -> Commit:
        """Replace a branch's history by one commit without a parent."""
        with self.lock:
            former = self.history(branch)
            commit = self.push("refs/squashed", former[0].files, message, "", author)
            del self.branches["refs/squashed"]
            self.branches[branch] = commit.sha
            kept = {one.sha for ref in (*self.branches, *self.tags) for one in self.history(ref)}
            for one in former:
                if one.sha not in kept:
                    del self.commits[one.sha]
            return commit

    def open_pull(self, title: str, author: str, *, status: str, parent: str | None = None) -> Pull:
        with self.lock:
            base = self.at(parent or "main").sha
            pull = Pull(len(self.pulls) + 1, title, author, base, status)
            self.pulls[pull.num] = pull
            self.branches[pull.ref] = base
            return pull

    def merge(self, pull: Pull, author: str) -> Commit:
        """Merge a pull request into the main branch, unless both changed the same file."""
        with self.lock:
            assert pull.base is not None
            base, head, main = (self.at(revision).files for revision in (pull.base, pull.ref, "main"))
            changed = {path for path in base.keys() | head.keys() if base.get(path) != head.get(path)}
            conflicts = [path for path in changed if main.get(path) not in (base.get(path), head.get(path))]
            if conflicts:
                raise ConflictError(f"This pull request has merge conflicts: {sorted(conflicts)}")
            changes = {path: head.get(path) for path in changed}
            commit = self.push("main", changes, f"{pull.title} (#{pull.num})", "", author)
            pull.merged, pull.status = commit.sha, "merged"
            return commit


@dataclass(frozen=True)
class Token:
    """A user and the rights of this token."""

    value: str
    user: str
    role: str  # "read", "write" or "fine-grained"
    # Fine-grained: "read" or "write" by namespace or by repository. Others: the user's organizations.
    namespaces: Mapping[str, str]
    gated: frozenset[str]  # gated repositories that granted this user access

    def right(self, repo_id: str) -> str | None:
        """Return "write", "read" or None for a repository, or for a namespace."""
        namespace = repo_id.split("/")[0]
        if self.role == "fine-grained":
            return self.namespaces.get(repo_id) or self.namespaces.get(namespace)
        if namespace == self.user or namespace in self.namespaces:
            return "write" if self.role == "write" else "read"
        return None

    def enters(self, repo: Repo) -> bool:
        """Return whether a gated repository grants access to this token."""
        return repo.id in self.gated or self.right(repo.id) is not None
