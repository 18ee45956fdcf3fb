"""Large files: upload instructions, uploads, and the storage behind the redirects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from tests.fakes.hub import access
from tests.fakes.hub.server import Call, HubError, Reply, as_json, ranged
from tests.fakes.hub.store import Repo, Token, read_chunks

if TYPE_CHECKING:
    from tests.fakes.hub import LoopbackHub

REPO_ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
GIT_LFS = re.compile(rf"/(?:(?P<kind>dataset)s/)?{REPO_ID}\.git/info/lfs/objects/(?P<action>batch|verify)")
STORED = re.compile(rf"/cdn/(?P<kind>model|dataset)s/{REPO_ID}/(?P<sha256>[0-9a-f]{{64}})/.+")
UPLOAD = re.compile(r"/upload/(?P<key>.+/(?P<sha256>[0-9a-f]{64}))(?:/(?P<part>\d+))?")
COMPLETE = re.compile(r"/api/complete-multipart/(?P<key>.+/[0-9a-f]{64})")


def git_lfs(hub: LoopbackHub, call: Call, repo: Repo, token: Token | None, action: str) -> Reply:
    asked = call.json()
    if action == "verify":
        access.need_token(token)
        if asked["oid"] not in repo.lfs or hub.blobs.lfs(asked["oid"]).size != asked["size"]:
            raise HubError(404, f"The content {asked['oid']} was not uploaded")
        return as_json({})
    # Without a ref the content may become part of a pull request, which needs no right on a branch.
    revision = asked.get("ref", {}).get("name")
    access.need_push(repo, token, revision, create_pr=revision is None)
    multipart = "multipart" in asked["transfers"]
    objects = [_instructions(hub, call, repo, wanted, multipart=multipart) for wanted in asked["objects"]]
    return as_json({"transfer": "multipart" if multipart else "basic", "objects": objects})


def _instructions(
    hub: LoopbackHub, call: Call, repo: Repo, wanted: dict[str, Any], *, multipart: bool
) -> dict[str, Any]:
    """Return how to upload one content, or no actions if it is already here."""
    sha256, size = wanted["oid"], wanted["size"]
    if sha256 in repo.lfs:
        return {"oid": sha256, "size": size}
    key = f"{repo.kind}s/{repo.id}/{sha256}"
    upload: dict[str, Any] = {"href": hub.cdn_url(f"/upload/{key}")}
    if multipart and size > hub.chunk_size:
        parts = {str(n): hub.cdn_url(f"/upload/{key}/{n}") for n in range(1, ceil(size / hub.chunk_size) + 1)}
        upload = {"href": hub.signed(call.origin, f"/api/complete-multipart/{key}")}
        upload["header"] = {"chunk_size": str(hub.chunk_size), **parts}
    verify = {"href": f"{call.origin}/{repo.web_path}.git/info/lfs/objects/verify"}
    return {"oid": sha256, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


def storage(hub: LoopbackHub, call: Call) -> Reply:
    """Answer as the storage behind signed URLs."""
    _need_signature(hub, call)
    if "authorization" in call.headers:
        # As the real storage: a signature together with a token is an error, and it must never see a token.
        raise HubError(400, "Only one auth mechanism allowed")
    if (match := UPLOAD.fullmatch(unquote(call.path))) is not None and call.method == "PUT":
        return _upload(hub, call, match)
    if (match := STORED.fullmatch(unquote(call.path))) is not None and call.method in ("GET", "HEAD"):
        blob = hub.blobs.lfs(match["sha256"])
        headers = {"Content-Type": "application/octet-stream", "ETag": f'"{blob.sha256}"', "Accept-Ranges": "bytes"}
        return ranged(Reply(200, headers, file=blob.file, length=blob.size), call.headers.get("range"))
    raise HubError(404, f"Sorry, there is nothing at {call.method} {call.path}")


def _need_signature(hub: LoopbackHub, call: Call) -> None:
    if call.option("signature") != hub.signature(unquote(call.path)):
        raise HubError(403, "The signature does not fit the request")


def _upload(hub: LoopbackHub, call: Call, match: re.Match[str]) -> Reply:
    incoming, sha256, _ = hub.blobs.receive(call.body)
    if match["part"] is not None:
        part = hub.parts(match["key"]) / match["part"]
        incoming.replace(part)
        part.with_suffix(".etag").write_text(sha256)
        return Reply(200, {"ETag": f'"{sha256}"'})
    _receive_whole(hub, match["key"], incoming, sha256)
    return Reply(200, {"ETag": f'"{sha256}"'})


def _receive_whole(hub: LoopbackHub, key: str, incoming: Path, sha256: str) -> None:
    kind, _, rest = key.partition("s/")
    repo_id, _, expected = rest.rpartition("/")
    if sha256 != expected:
        incoming.unlink()
        raise HubError(400, f"The content has the sha256 {sha256}, not {expected}")
    hub.blobs.keep(incoming, sha256)
    repo = hub.repo(kind, repo_id)
    with repo.lock:
        repo.lfs.add(sha256)


def complete(hub: LoopbackHub, call: Call, key: str) -> Reply:
    """Join the parts of a content."""
    _need_signature(hub, call)
    key = unquote(key)
    folder = hub.parts(key)
    listed = call.json()["parts"]
    for part in listed:
        etag = folder / f"{part['partNumber']}.etag"
        if not etag.exists() or etag.read_text() != part["etag"].strip('"'):
            raise HubError(400, f"Part {part['partNumber']} was not uploaded")

    def chunks() -> Iterator[bytes]:
        for part in sorted(listed, key=lambda part: part["partNumber"]):
            yield from read_chunks(folder / str(part["partNumber"]))

    incoming, sha256, _ = hub.blobs.receive(chunks())
    _receive_whole(hub, key, incoming, sha256)
    for file in folder.iterdir():
        file.unlink()
    return as_json({"success": True})
