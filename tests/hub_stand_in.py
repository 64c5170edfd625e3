"""A model hub on localhost: as much of the hub's API as reading and pushing files needs.

Repositories hold commits, commits hold files. A write needs the token; a private repository shows
itself to nobody else. Every request is kept, so that a test can see what was asked.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_stand_in"


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)} {message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class StandIn(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.lying_sizes: dict[str, int] = {}  # file name -> size that is claimed

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        repository = self.repositories.setdefault(repo_id, Repository(private))
        return repository.commit("main", files)


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *args: object) -> None:
        pass

    def _send(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, code: int = 200) -> None:
        self._send(code, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, code: int, kind: str) -> None:
        self._send(code, json.dumps({"error": kind}).encode(), X_Error_Code=kind,
                   X_Error_Message=kind, Content_Type="application/json")  # fmt: skip

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, repo_id: str) -> Repository | None:
        found = self.server.repositories.get(repo_id)
        if found is None or (found.private and not self._known()):
            self._error(401 if not self._known() else 404, "RepoNotFound")
            return None
        return found

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            repository = self._repository("/".join(parts[2:4]))
            if repository is None:
                return
            if parts[4:5] not in ([], ["revision"]):
                return self._error(404, "EntryNotFound")
            revision = parts[5] if len(parts) > 5 else "main"
            oid = repository.branches.get(revision, revision)
            if oid not in repository.commits:
                return self._error(404, "RevisionNotFound")
            files = [{"rfilename": name} for name in repository.commits[oid]]
            return self._json({"id": "/".join(parts[2:4]), "sha": oid, "siblings": files,
                               "private": repository.private})  # fmt: skip
        if len(parts) < 5 or parts[2] != "resolve":
            return self._error(404, "EntryNotFound")
        repository = self._repository("/".join(parts[:2]))
        if repository is None:
            return
        oid, name = repository.branches.get(parts[3], parts[3]), "/".join(parts[4:])
        if oid not in repository.commits:
            return self._error(404, "RevisionNotFound")
        if name not in repository.commits[oid]:
            return self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        data = repository.commits[oid][name]
        size = self.server.lying_sizes.get(name, len(data))
        self._send(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=oid,
                   Content_Length=str(size), Accept_Ranges="bytes")  # fmt: skip

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._known():
            return self._error(401, "Unauthorized")
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        repo_id, what, branch = "/".join(parts[2:4]), parts[4], parts[5]
        repository = self._repository(repo_id)
        if repository is None:
            return
        if branch not in repository.branches:
            return self._error(404, "RevisionNotFound")
        if what == "preupload":
            old = repository.files(branch)
            return self._json({"files": [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False,
                 "oid": _git_oid(old[f["path"]]) if f["path"] in old else None}
                for f in json.loads(body)["files"]
            ]})  # fmt: skip
        assert what == "commit"
        files, summary = dict(repository.files(branch)), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(entry["key"])
        as_request = parse_qs(url.query).get("create_pr") == ["1"]
        oid = repository.commit("refs/pr/1" if as_request else branch, files, summary)
        request = {"pullRequestUrl": f"{self.server.url}/{repo_id}/discussions/1"}
        self._json({"commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}",
                    **(request if as_request else {})})  # fmt: skip

    def _create(self, wanted: dict[str, object]) -> None:
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.server.url}/{repo_id}"}
        if repo_id in self.server.repositories:
            return self._json(url | {"error": "You already created this model repo"}, 409)
        made = self.server.repositories[repo_id] = Repository(
            bool(wanted.get("private")) or wanted.get("visibility") == "private"
        )
        made.commit("main", {".gitattributes": b""}, "initial commit")
        self._json(url)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
