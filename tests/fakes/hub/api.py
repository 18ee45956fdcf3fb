"""The hub's own endpoints: accounts, repositories, files, commits and pull requests."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from hashlib import sha1
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlencode

import yaml

from tests.fakes.hub import access, lfs
from tests.fakes.hub.server import Call, HubError, Reply, as_json, ranged
from tests.fakes.hub.store import GITATTRIBUTES, Blob, Commit, ConflictError, Pull, Repo, Token, pointer

if TYPE_CHECKING:
    from tests.fakes.hub import LoopbackHub

VERBS = (
    "revision",
    "tree",
    "paths-info",
    "refs",
    "commits",
    "branch",
    "tag",
    "preupload",
    "commit",
    "super-squash",
    "discussions",
    "settings",
    "auth-check",
)
# A repository's name is one or two segments, so the next segment decides where it ends.
REPO_ID = rf"(?P<id>[^/]+(?:/(?!(?:{'|'.join(VERBS)}|resolve)(?:/|$))[^/]+)?)"
API = re.compile(rf"/api/(?P<kind>model|dataset)s/{REPO_ID}(?:/(?P<verb>{'|'.join(VERBS)})(?:/(?P<rest>.*))?)?")
API_LIST = re.compile(r"/api/(?P<kind>model|dataset)s")
RESOLVE = re.compile(
    rf"/(?:(?P<kind>dataset)s/)?{REPO_ID}/resolve/(?P<rev>refs/(?:pr|convert)/[^/]+|[^/]+)/(?P<path>.+)"
)
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?\n)---\s*$", re.DOTALL | re.MULTILINE)


class Api:
    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub
        self._fixed: dict[tuple[str, str], Callable[[Call, Token | None], Reply]] = {
            ("GET", "/api/whoami-v2"): self._whoami,
            ("POST", "/api/validate-yaml"): self._validate_yaml,
            ("POST", "/api/repos/create"): self._create_repo,
            ("DELETE", "/api/repos/delete"): self._delete_repo,
        }
        self._verbs: dict[tuple[str, str | None], Callable[[Call, Token | None, Repo, str], Reply]] = {
            ("GET", None): self._info,
            ("GET", "revision"): self._info,
            ("GET", "tree"): self._tree,
            ("POST", "paths-info"): self._paths_info,
            ("GET", "refs"): self._refs,
            ("GET", "commits"): self._commits,
            ("POST", "branch"): self._create_branch,
            ("DELETE", "branch"): self._delete_branch,
            ("POST", "tag"): self._create_tag,
            ("DELETE", "tag"): self._delete_tag,
            ("POST", "preupload"): self._preupload,
            ("POST", "commit"): self._commit,
            ("POST", "super-squash"): self._squash,
            ("PUT", "settings"): self._settings,
            ("GET", "auth-check"): self._auth_check,
            ("GET", "discussions"): self._discussions,
            ("POST", "discussions"): self._change_discussion,
        }

    def answer(self, call: Call) -> Reply:
        token = self._token(call)
        if (fixed := self._fixed.get((call.method, call.path))) is not None:
            return fixed(call, token)
        if (match := RESOLVE.fullmatch(call.path)) is not None:
            return self._resolve(call, token, match)
        if (match := lfs.GIT_LFS.fullmatch(call.path)) is not None:
            repo = access.need_read(self.hub.find_repo(match["kind"] or "model", unquote(match["id"])), token)
            return lfs.git_lfs(self.hub, call, repo, token, match["action"])
        if (match := lfs.COMPLETE.fullmatch(call.path)) is not None:
            return lfs.complete(self.hub, call, match["key"])
        if (match := API.fullmatch(call.path)) is not None:
            return self._repo_call(call, token, match)
        if (match := API_LIST.fullmatch(call.path)) is not None:
            return self._list(call, token, match["kind"])
        if call.path.startswith("/api/telemetry/"):
            return Reply()
        raise HubError(404, f"Sorry, there is nothing at {call.method} {call.path}")

    def _token(self, call: Call) -> Token | None:
        given = call.headers.get("authorization")
        if given is None:
            return None
        token = self.hub.find_token(given.removeprefix("Bearer ").strip())
        if token is None:
            raise HubError(401, access.WRONG_TOKEN)
        return token

    def _repo_call(self, call: Call, token: Token | None, match: re.Match[str]) -> Reply:
        repo = access.need_read(self.hub.find_repo(match["kind"], unquote(match["id"])), token)
        handle = self._verbs.get((call.method, match["verb"]))
        if handle is None:
            raise HubError(404, f"Sorry, there is nothing at {call.method} {call.path}")
        return handle(call, token, repo, match["rest"] or "")

    # Accounts

    def _whoami(self, call: Call, token: Token | None) -> Reply:
        token = access.need_token(token)
        access_token: dict[str, Any] = {"displayName": "kitchen", "role": token.role, "createdAt": self.hub.started}
        organizations = list(token.namespaces)
        if token.role == "fine-grained":
            # Scopes name users and repositories; they grant no membership of an organization.
            organizations = []
            access_token["role"] = "fineGrained"
            access_token["fineGrained"] = {
                "canReadGatedRepos": bool(token.gated),
                "global": [],
                "scoped": [
                    {
                        "entity": {"_id": _id(scope), "type": "model" if "/" in scope else "user", "name": scope},
                        "permissions": ["repo.content.read", *(["repo.write"] if right == "write" else [])],
                    }
                    for scope, right in token.namespaces.items()
                ],
            }
        return as_json(
            {
                "type": "user",
                "id": _id(token.user),
                "name": token.user,
                "fullname": token.user.title(),
                "email": None,
                "isPro": False,
                "orgs": [
                    {"type": "org", "id": _id(name), "name": name, "fullname": name, "roleInOrg": token.role}
                    for name in organizations
                ],
                "auth": {"type": "access_token", "accessToken": access_token},
            }
        )

    def _auth_check(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        access.need_entry(repo, token)
        if rest == "write":
            access.need_write(repo, token)
        return as_json({})

    def _validate_yaml(self, call: Call, token: Token | None) -> Reply:
        content = call.json()["content"]
        try:
            card = front_matter(content)
        except yaml.YAMLError as error:
            return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        if refused := [{"message": f'"{name}" is not valid'} for name in refused_fields(card or {})]:
            return as_json({"errors": refused, "warnings": []}, 400)
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        return as_json({"errors": [], "warnings": warnings})

    # Repositories

    def _create_repo(self, call: Call, token: Token | None) -> Reply:
        asked = call.json()
        kind = asked.get("type") or "model"
        token = access.need_token(token)
        repo_id = f"{asked.get('organization') or token.user}/{asked['name']}"
        if kind not in ("model", "dataset"):
            raise HubError(400, f"Only models and datasets are kept here, not a {kind}")
        access.need_namespace(repo_id.split("/")[0], token, kind)
        private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
        try:
            repo = self.hub.create(kind, repo_id, {".gitattributes": GITATTRIBUTES}, private=private, author=token.user)
        except FileExistsError:
            repo = self.hub.repo(kind, repo_id)
            message = f"You already created this {kind} repo: {repo_id}"
            raise HubError(409, message, url=f"{call.origin}/{repo.web_path}", name=repo_id) from None
        return as_json({"url": f"{call.origin}/{repo.web_path}", "name": repo_id, "id": _id(repo_id)})

    def _delete_repo(self, call: Call, token: Token | None) -> Reply:
        asked = call.json()
        token = access.need_token(token)
        repo_id = f"{asked.get('organization') or token.user}/{asked['name']}"
        repo = access.need_read(self.hub.find_repo(asked.get("type") or "model", repo_id), token)
        access.need_write(repo, token)
        self.hub.remove(repo)
        return as_json({})

    def _settings(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        access.need_write(repo, token)
        asked = call.json()
        with repo.lock:
            if "visibility" in asked or "private" in asked:
                repo.private = asked.get("visibility") == "private" or asked.get("private") is True
            repo.gated = asked.get("gated", repo.gated)
        return as_json({"private": repo.private, "gated": repo.gated})

    def _list(self, call: Call, token: Token | None, kind: str) -> Reply:
        author, search = call.option("author"), call.option("search").lower()
        repos = [
            repo
            for repo in self.hub.repos()
            if repo.kind == kind
            and (not repo.private or (token is not None and token.right(repo.id) is not None))
            and author in ("", repo.namespace)
            and search in repo.id.lower()
        ]
        return self._paged(call, [{"id": repo.id, "private": repo.private, "sha": repo.sha} for repo in repos], 100)

    def _info(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        commit = access.need_commit(repo, unquote(rest) or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if call.flag("blobs"):
            for sibling in siblings:
                blob = commit.files[sibling["rfilename"]]
                sibling.update(size=blob.size, blobId=blob.oid)
                if blob.lfs:
                    size = len(pointer(blob.sha256, blob.size))
                    sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": size}
        info = {
            "_id": _id(repo.id),
            "id": repo.id,
            "author": repo.namespace,
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": repo.created,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "cardData": card_of(commit),
            "siblings": siblings,
            "usedStorage": sum(blob.size for blob in commit.files.values()),
        }
        wanted = call.query.get("expand", []) + call.query.get("expand[]", [])
        return as_json({key: info.get(key) for key in ("_id", "id", *wanted)} if wanted else info)

    # Files

    def _resolve(self, call: Call, token: Token | None, match: re.Match[str]) -> Reply:
        repo = access.need_read(self.hub.find_repo(match["kind"] or "model", unquote(match["id"])), token)
        access.need_entry(repo, token)
        commit = access.need_commit(repo, unquote(match["rev"]))
        path = unquote(match["path"])
        blob = commit.files.get(path)
        common = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if blob is None:
            error = access.entry_not_found(path)
            return as_json(error.body, error.status, **error.headers, **common)
        if call.method not in ("GET", "HEAD"):
            raise HubError(405, f"{call.method} is not for files")
        if not blob.lfs:
            return file_reply(blob, call, common)
        location = self.hub.cdn_url(f"/cdn/{repo.kind}s/{repo.id}/{blob.sha256}/{path}")
        headers = {"Location": location, "X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        return Reply(302, {**headers, **common}, f"Found. Redirecting to {location}".encode())

    def _tree(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        revision, _, folder = rest.partition("/")
        commit = access.need_commit(repo, unquote(revision))
        folder = unquote(folder).strip("/")
        expand = call.flag("expand")
        entries = list(listing(commit, folder, recursive=call.flag("recursive")))
        if folder and not entries:
            raise access.entry_not_found(folder)
        if expand:
            for entry in entries:
                entry["lastCommit"] = {"id": commit.sha, "title": commit.title, "date": commit.date}
        return self._paged(call, entries, 50 if expand else 1000)

    def _paths_info(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        commit = access.need_commit(repo, unquote(rest))
        body = call.read().decode()
        is_json = "json" in call.headers.get("content-type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body).get("paths", [])
        known = {entry["path"]: entry for entry in listing(commit, "", recursive=True)}
        return as_json([known[path.strip("/")] for path in paths if path.strip("/") in known])

    def _paged(self, call: Call, items: list[dict[str, Any]], size: int) -> Reply:
        size = self.hub.page_size or size
        start = int(call.option("cursor", "0"))
        headers = {}
        if start + size < len(items):
            query = urlencode({**call.query, "cursor": [str(start + size)]}, doseq=True)
            headers["Link"] = f'<{call.origin}{call.path}?{query}>; rel="next"'
        return as_json(items[start : start + size], **headers)

    # Branches and commits

    def _refs(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        with repo.lock:
            branches = dict(repo.branches)
            tags = dict(repo.tags)
        pulls = {name: sha for name, sha in branches.items() if name.startswith("refs/pr/")}
        heads = {name: sha for name, sha in branches.items() if name not in pulls}

        def listed(refs: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]

        return as_json(
            {
                "branches": listed(heads, "refs/heads/"),
                "converts": [],
                "tags": listed(tags, "refs/tags/"),
                "pullRequests": listed(pulls, ""),
            }
        )

    def _commits(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        access.need_commit(repo, unquote(rest))
        commits = [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in repo.history(unquote(rest))
        ]
        return self._paged(call, commits, 50)

    def _create_branch(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        access.need_write(repo, token)
        start = access.need_commit(repo, call.json().get("startingPoint") or "main")
        return self._create_ref(repo.branches, repo, unquote(rest), start)

    def _create_tag(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        access.need_write(repo, token)
        return self._create_ref(repo.tags, repo, call.json()["tag"], access.need_commit(repo, unquote(rest)))

    def _create_ref(self, refs: dict[str, str], repo: Repo, name: str, commit: Commit) -> Reply:
        with repo.lock:
            if name in refs:
                raise HubError(409, f"Reference {name} exists already")
            refs[name] = commit.sha
        return as_json({}, 201)

    def _delete_branch(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        access.need_write(repo, token)
        if rest == "main":
            raise HubError(403, "The main branch cannot be deleted")
        return self._delete_ref(repo.branches, repo, unquote(rest))

    def _delete_tag(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        access.need_write(repo, token)
        return self._delete_ref(repo.tags, repo, unquote(rest))

    def _delete_ref(self, refs: dict[str, str], repo: Repo, name: str) -> Reply:
        with repo.lock:
            if refs.pop(name, None) is None:
                raise HubError(404, f"Reference {name} does not exist", "RevisionNotFound")
        return as_json({})

    def _squash(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        token = access.need_write(repo, token)
        repo.squash(unquote(rest), str(call.json()["message"]), token.user)
        return as_json({})

    def _preupload(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        revision = unquote(rest)
        access.need_push(repo, token, revision, create_pr=call.flag("create_pr"))
        files = access.need_commit(repo, revision).files
        asked = call.json()
        ignored = [line.strip() for line in asked.get("gitIgnore", "").splitlines() if line.strip()]
        answers = []
        for file in asked["files"]:
            path = file["path"]
            is_lfs = self.hub.blobs.is_lfs(path, file["size"], base64.b64decode(file["sample"]))
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": any(fnmatchcase(path, rule) or fnmatchcase(path, f"*/{rule}") for rule in ignored),
                    # Clients compare this with the sha256 of an LFS file, not with the hash of its pointer.
                    "oid": files[path].etag if path in files else None,
                }
            )
        return as_json({"files": answers})

    def _commit(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        revision = unquote(rest)
        create_pr = call.flag("create_pr")
        token = access.need_push(repo, token, revision, create_pr=create_pr)
        lines = [json.loads(line) for line in call.read().splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with repo.lock:
            head = access.need_commit(repo, revision)
            if revision not in repo.branches:
                raise HubError(404, f"{revision} is not a branch", "RevisionNotFound")
            changes = self._changes(repo, head, lines)
            parent = header.get("parentCommit")
            pull = None
            if create_pr:
                pull = repo.open_pull(header["summary"], token.user, status="open", parent=parent or head.sha)
            try:
                commit = repo.push(
                    pull.ref if pull else revision,
                    changes,
                    header["summary"],
                    header.get("description", ""),
                    token.user,
                    parent=None if pull else parent,
                )
            except ConflictError as error:
                raise HubError(412, str(error)) from None
        url = f"{call.origin}/{repo.web_path}"
        done = {"success": True, "commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}", "hookOutput": ""}
        return as_json({**done, "pullRequestUrl": f"{url}/discussions/{pull.num}" if pull else None})

    def _changes(self, repo: Repo, head: Commit, lines: list[dict[str, Any]]) -> dict[str, Blob | None]:
        changes: dict[str, Blob | None] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                incoming, sha256, _ = self.hub.blobs.receive([base64.b64decode(value["content"])])
                self.hub.blobs.keep(incoming, sha256)
                changes[value["path"]] = self.hub.blobs.regular(sha256)
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.lfs:
                    raise HubError(400, f"An LFS pointer pointed to a file that does not exist: {value['path']}")
                changes[value["path"]] = self.hub.blobs.lfs(value["oid"])
            elif line["key"] in ("deletedFile", "deletedFolder"):
                prefix = value["path"].rstrip("/")
                folder = line["key"] == "deletedFolder"
                gone = [path for path in head.files if path == prefix or (folder and path.startswith(f"{prefix}/"))]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                changes.update(dict.fromkeys(gone))
        return changes

    # Discussions and pull requests

    def _discussions(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        with repo.lock:
            if rest:
                return as_json(described(repo, self._pull(repo, rest)))
            found = [described(repo, pull) for pull in repo.pulls.values()]
        return as_json({"discussions": found, "count": len(found), "start": 0})

    def _pull(self, repo: Repo, number: str) -> Pull:
        pull = repo.pulls.get(int(number))
        if pull is None:
            raise HubError(404, f"There is no discussion {number}")
        return pull

    def _change_discussion(self, call: Call, token: Token | None, repo: Repo, rest: str) -> Reply:
        token = access.need_token(token)
        asked = call.json() or {}
        if token.role == "read":
            raise HubError(403, "You must use a token with write access to take part in discussions")
        with repo.lock:
            if not rest:
                pull = repo.open_pull(asked["title"], token.user, status="draft" if asked["pullRequest"] else "open")
                if not asked["pullRequest"]:
                    del repo.branches[pull.ref]
                    pull.base = None
                pull.note("comment", token.user, _comment(asked.get("description", "")))
                return as_json({"num": pull.num, "pullRequest": asked["pullRequest"]}, 201)
            number, _, action = rest.partition("/")
            pull = self._pull(repo, number)
            if action == "comment":
                return as_json({"newMessage": pull.note("comment", token.user, _comment(asked["comment"]))})
            access.need_push(repo, token, pull.ref if action == "status" else "main")
            if action == "status":
                pull.status = asked["status"]
                return as_json({"newStatus": pull.note("status-change", token.user, {"status": pull.status})})
            if action == "merge":
                return self._merge(repo, pull, token)
        raise HubError(404, f"Sorry, there is nothing at {call.method} {call.path}")

    def _merge(self, repo: Repo, pull: Pull, token: Token) -> Reply:
        if pull.base is None or pull.status != "open":
            raise HubError(400, f"Only an open pull request can be merged, this one is {pull.status}")
        try:
            repo.merge(pull, token.user)
        except ConflictError as error:
            raise HubError(409, str(error)) from None
        pull.note("status-change", token.user, {"status": "merged"})
        return as_json({})


def _id(text: str) -> str:
    return sha1(text.encode()).hexdigest()[:24]


def _comment(text: str) -> dict[str, object]:
    return {"edited": False, "hidden": False, "latest": {"raw": text}}


def described(repo: Repo, pull: Pull) -> dict[str, Any]:
    return {
        "num": pull.num,
        "title": pull.title,
        "author": {"name": pull.author},
        "createdAt": pull.created,
        "status": pull.status,
        "repo": {"name": repo.id, "type": repo.kind},
        "isPullRequest": pull.base is not None,
        "events": pull.events,
        "changes": {"base": "refs/heads/main", "mergeCommitId": pull.merged},
        "filesWithConflicts": [],
        "diff": "",
    }


def front_matter(text: str) -> dict[str, Any] | None:
    match = FRONT_MATTER.match(text)
    card = yaml.safe_load(match[1]) if match else None
    return card if isinstance(card, dict) else None


def refused_fields(card: dict[str, Any]) -> list[str]:
    """Return the fields of a card that the Hub refuses, as far as it is known of it and by the form alone."""
    forms = {
        "license": r"[a-z0-9][a-z0-9.+-]*",
        "license_name": r"[a-z0-9._-]+",
        "language": r"[a-z]{2,3}|code|multilingual",
    }
    given = {name: card[name] if isinstance(card[name], list) else [card[name]] for name in forms if name in card}
    return [name for name, values in given.items() if not all(re.fullmatch(forms[name], str(v)) and v for v in values)]


def card_of(commit: Commit) -> dict[str, Any] | None:
    blob = commit.files.get("README.md")
    try:
        return None if blob is None else front_matter(blob.read().decode())
    except yaml.YAMLError:
        return None


def listing(commit: Commit, folder: str, *, recursive: bool) -> Iterator[dict[str, Any]]:
    """Yield the contents of a folder, each folder once, before its files."""
    prefix = f"{folder}/" if folder else ""
    folders = set()
    for path in sorted(commit.files):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            name = prefix + "/".join(parts[:depth])
            if name not in folders:
                folders.add(name)
                oid = sha1(f"{commit.sha}{name}".encode()).hexdigest()
                yield {"type": "directory", "oid": oid, "size": 0, "path": name}
        if recursive or len(parts) == 1:
            blob = commit.files[path]
            entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
            if blob.lfs:
                size = len(pointer(blob.sha256, blob.size))
                entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": size}
            yield entry


def file_reply(blob: Blob, call: Call, headers: dict[str, str]) -> Reply:
    headers = {
        "Content-Type": "application/octet-stream",
        "ETag": f'"{blob.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"inline; filename*=UTF-8''{call.path.rsplit('/', 1)[-1]}",
        **headers,
    }
    return ranged(Reply(200, headers, file=blob.file, length=blob.size), call.headers.get("range"))
