"""As much of the Hugging Face Hub's interface as making, filling and reading a repository takes, in memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories by name: of each its commits, oldest first, as (name, files); a branch "main", and tags."""

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.address = ""

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        before = self.commits.setdefault(repository, [])
        content = {**(before[-1][1] if before else {}), **files}
        name = hashlib.sha1(repr((len(before), sorted(content.items()))).encode()).hexdigest()
        before.append((name, content))
        return name

    def files(self, repository: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision and its files."""
        commits = self.commits[repository]
        revision = commits[-1][0] if revision == "main" else self.tags.get(repository, {}).get(revision, revision)
        return next((commit for commit in commits if commit[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b'{"error": "no"}', X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        user, name, *rest = self.path.lstrip("/").split("/")
        repository = f"{user}/{name}"
        if repository not in self.hub.commits or rest[:1] != ["resolve"]:
            return self.refuse(404 if user == "api" else 401, "RepoNotFound")
        found = self.hub.files(repository, rest[1])
        if found is None:
            return self.refuse(404, "RevisionNotFound")
        commit, files = found
        if rest[2] not in files:
            return self.refuse(404, "EntryNotFound")
        content = files[rest[2]]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(200, content, X_Repo_Commit=commit, ETag=etag)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.refuse(401, "Unauthorized")
        parts = self.path.lstrip("/").partition("?")[0].split("/")
        if parts == ["api", "repos", "create"]:
            said = json.loads(body)
            repository = f"{said.get('organization') or 'somebody'}/{said['name']}"
            if repository not in self.hub.commits:
                self.hub.commit(repository, {".gitattributes": b""})
                self.hub.private[repository] = said.get("private") or said.get("visibility") == "private"
            return self.answer(200, json.dumps({"url": f"{self.hub.address}/{repository}"}).encode())
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, b'{"errors": [], "warnings": []}')
        repository, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, json.dumps({"files": files}).encode())
        assert action == "commit"
        lines: list[dict[str, Any]] = [json.loads(line) for line in body.splitlines() if line]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        name = self.hub.commit(repository, files)
        address = f"{self.hub.address}/{repository}/commit/{name}"
        return self.answer(200, json.dumps({"commitUrl": address, "commitOid": name}).encode())


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
