"""A Hugging Face hub of a few endpoints on 127.0.0.1: repositories in memory, every request kept.

It does what the hub does with the requests of `huggingface_hub`: commits are content, large files
go to and come from another host (`localhost`), to which no login may be sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_testOnlyAbcdefghijklmnopqrstuvw"
OWNER = "alice"
LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    """Branches and tags to commits, commits to files."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Make a commit with exactly these files."""
        content = [(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())]
        sha = hashlib.sha1(f"{content} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the main branch."""
        return self.commits[self.refs["main"]]


@dataclass
class Request:
    """The requests received."""

    method: str
    path: str
    host: str
    authorization: str | None
    body: bytes


@dataclass
class HubDouble:
    """The hub.

    Attributes:
        role: What its one token may do: read or write.
        failures: `METHOD path-pattern` to the statuses of its next replies, instead of doing it.
        echoes: Whether messages of failures repeat the login, as a broken server might.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    failures: dict[str, list[int]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    role: str = "write"
    echoes: bool = False
    endpoint: str = ""

    def add(self, name: str, files: dict[str, bytes], **settings: Any) -> Repository:
        """Add a repository with one commit."""
        repository = Repository(**settings)
        repository.commit(files)
        self.repositories[name] = repository
        return repository

    def fail(self, method: str, pattern: str, *statuses: int) -> None:
        """Answer the next requests of a kind by these statuses."""
        self.failures[f"{method} {pattern}"] = list(statuses)

    def asked(self, method: str, pattern: str) -> list[Request]:
        """The requests of a kind so far."""
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def next_failure(self, method: str, path: str) -> int | None:
        for kind, statuses in self.failures.items():
            wanted, _, pattern = kind.partition(" ")
            if wanted == method and statuses and re.search(pattern, path):
                return statuses.pop(0)
        return None


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: HubDouble

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlsplit(self.path).path)
        login = self.headers.get("Authorization")
        host = self.headers["Host"].partition(":")[0]
        self.hub.requests.append(Request(self.command, path, host, login, body))
        status = self.hub.next_failure(self.command, path)
        if status is not None:
            message = f"not now, {login}" if self.hub.echoes else "not now"
            return self.refuse(status, message)
        for pattern, method, answer in ROUTES:
            matched = re.fullmatch(pattern, path)
            if matched and method in (self.command, "GET" if self.command == "HEAD" else ""):
                return answer(self, *matched.groups(), body=body)
        return self.refuse(404, f"no such endpoint: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def reply(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.reply(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Message": message}
        if code:
            headers["X_Error_Code"] = code
        self.send_json({"error": message}, status, **headers)

    def find(self, name: str) -> Repository | None:
        """The repository, or None after a refusal in the hub's words."""
        login = self.headers.get("Authorization")
        if login is not None and not self.is_known:
            self.refuse(401, "Invalid credentials in Authorization header")
            return None
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.is_known):
            self.refuse(404 if login else 401, "Repository not found", "RepoNotFound")
            return None
        return repository

    def find_commit(self, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.find(name)
        if repository is None:
            return None
        sha = repository.find(revision)
        if sha is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return repository, sha

    # ── reading ──

    def whoami(self, *, body: bytes) -> None:
        if not self.is_known:
            return self.refuse(401, "Invalid credentials in Authorization header")
        access = {"role": self.hub.role, "displayName": "test"}
        return self.send_json({"type": "user", "name": OWNER, "auth": {"accessToken": access}})

    def info(self, name: str, revision: str | None, *, body: bytes) -> None:
        found = self.find_commit(name, revision or "main")
        if found is None:
            return
        repository, sha = found
        siblings = [{"rfilename": file} for file in repository.commits[sha]]
        self.send_json(
            {"id": name, "sha": sha, "private": repository.private, "siblings": siblings}
        )

    def tree(self, name: str, revision: str, *, body: bytes) -> None:
        found = self.find_commit(name, revision)
        if found is None:
            return
        repository, sha = found
        entries = []
        for file, data in repository.commits[sha].items():
            entry = {"type": "file", "path": file, "size": len(data), "oid": blob_id(data)}
            if file.endswith(LARGE):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
            entries.append(entry)
        self.send_json(entries)

    def resolve(self, name: str, revision: str, file: str, *, body: bytes) -> None:
        found = self.find_commit(name, revision)
        if found is None:
            return
        repository, sha = found
        if repository.gated:
            self.refuse(403 if self.is_known else 401, "Access is restricted", "GatedRepo")
            return
        data = repository.commits[sha].get(file)
        if data is None:
            self.refuse(404, "Entry not found", "EntryNotFound")
        elif file.endswith(LARGE):
            digest = hashlib.sha256(data).hexdigest()
            self.hub.objects[digest] = data
            headers = {"X_Repo_Commit": sha, "X_Linked_Etag": f'"{digest}"'}
            headers |= {"X_Linked_Size": str(len(data)), "Location": self.elsewhere(digest)}
            self.reply(b"", 302, **headers)
        else:
            self.reply(data, X_Repo_Commit=sha, ETag=f'"{blob_id(data)}"')

    def read_object(self, digest: str, *, body: bytes) -> None:
        self.reply(self.hub.objects[digest])

    def elsewhere(self, digest: str) -> str:
        """Where a large file is: at another host, which must not see a login."""
        return f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/objects/{digest}"

    # ── writing ──

    def create(self, *, body: bytes) -> None:
        if not self.is_known:
            return self.refuse(401, "Invalid credentials in Authorization header")
        asked = json.loads(body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return self.send_json({"error": "You already created this model repo", **url}, 409)
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self.send_json(url)

    def validate(self, *, body: bytes) -> None:
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str, *, body: bytes) -> None:
        if self.find(name) is None:
            return
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.send_json({"files": files})

    def batch(self, name: str, *, body: bytes) -> None:
        if self.find(name) is None:
            return
        objects = []
        for one in json.loads(body)["objects"]:
            href = self.elsewhere(one["oid"])
            objects.append({**one, "actions": {"upload": {"href": href}}})
        self.send_json({"transfer": "basic", "objects": objects})

    def write_object(self, digest: str, *, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != digest:
            return self.refuse(400, "the content is another one")
        self.hub.objects[digest] = body
        return self.reply(b"")

    def commit(self, name: str, revision: str, *, body: bytes) -> None:
        found = self.find_commit(name, revision)
        if found is None:
            return
        repository, parent = found
        lines = [json.loads(line) for line in body.splitlines()]
        wanted = lines[0]["value"].get("parentCommit")
        if wanted is not None and wanted != parent:
            self.refuse(412, "A commit has happened since")
            return
        files = dict(repository.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del files[value["path"]]
        sha = repository.commit(files, revision)
        url = f"{self.hub.endpoint}/{name}/commit/{sha}"
        self.send_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


NAME = r"([^/]+/[^/]+|[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("/api/whoami-v2", "GET", Handler.whoami),
    ("/api/repos/create", "POST", Handler.create),
    ("/api/validate-yaml", "POST", Handler.validate),
    (f"/api/models/{NAME}/tree/(.+)", "GET", Handler.tree),
    (f"/api/models/{NAME}/preupload/(.+)", "POST", Handler.preupload),
    (f"/api/models/{NAME}/commit/(.+)", "POST", Handler.commit),
    (f"/api/models/{NAME}(?:/revision/(.+))?", "GET", Handler.info),
    (r"/objects/(\w+)", "GET", Handler.read_object),
    (r"/objects/(\w+)", "PUT", Handler.write_object),
    (f"/{NAME}.git/info/lfs/objects/batch", "POST", Handler.batch),
    (f"/{NAME}/resolve/([^/]+|refs/.+?/[^/]+/[^/]+)/(.+)", "GET", Handler.resolve),
]


def blob_id(data: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def serve_hub() -> Iterator[HubDouble]:
    """Serve an empty hub on a free port."""
    hub = HubDouble()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_to(hub: HubDouble, cache: Any, monkeypatch: Any) -> None:
    """Have this process's client of the hub ask the double, with its own cache and login.

    They are the settings that the client reads from the environment when it is imported.
    """
    from huggingface_hub import constants, hf_api

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # as the command line has it
    # Between two tries the client waits for seconds.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
