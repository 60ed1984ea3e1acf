"""A stand-in of the Hugging Face Hub, as far as publishing needs it: the real one is not to be had in tests.

Repositories of models and data sets with commits, git and LFS files, privacy, gates and settings, in memory, by the
standard library. Faults can be put in front of it: a status, a connection that drops, a request that is never answered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_the_token_of_the_tests"
LFS_SUFFIXES = (".safetensors", ".parquet", ".tar", ".npy")


@dataclass
class Repo:
    private: bool
    gated: Any = False
    files: dict[str, tuple[str, bool]] = field(default_factory=dict)  # oid, whether it is LFS
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"first").hexdigest()])


@dataclass
class Fault:
    """What happens, `times` times, to requests that match."""

    method: str
    path: str  # regular expression
    status: int = 0  # 0: the connection drops after a part of the body
    times: int = 1
    hold: threading.Event | None = None  # set by the server when it holds the request, which it then never answers
    message: str = "planned by the test"


@dataclass
class State:
    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)  # "PUT /lfs/..." -> how often
    tokens_seen: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)


class Hub:
    """`with Hub() as hub:` serves on a free port of this machine; `hub.state` is what it holds."""

    def __enter__(self) -> Hub:
        self.state = State()
        handler = type("Handler", (_Handler,), {"state": self.state})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.state.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.state.lock:
            self.state.requests[f"{self.command} {path}"] += 1
            fault = next((f for f in self.state.faults if f.method == self.command and re.search(f.path, path)), None)
            if fault is not None:
                fault.times -= 1
                if not fault.times:
                    self.state.faults.remove(fault)
        if fault is not None and not fault.status:
            self._drop(fault)
            return
        body = self._body()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.state.tokens_seen.add(token)
        if fault is not None:
            self._json(fault.status, {"error": fault.message}, {"X-Error-Message": fault.message})
            return
        with self.state.lock:
            for pattern, answer in _ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    answer(self, body, token == TOKEN, **match.groupdict())
                    return
        self._json(404, {"error": f"no such address: {path}"})

    def _drop(self, fault: Fault) -> None:
        self.rfile.read1(1024)
        if fault.hold is not None:
            fault.hold.set()
            threading.Event().wait(60)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ------------------------------------------------------------------------------------------ what it answers

    def _repo(self, kind: str, repo: str, is_owner: bool) -> Repo | None:
        """None, answered, where there is none or it is not shown to this caller."""
        found = self.state.repos.get((kind, repo))
        if found is None or (found.private and not is_owner):
            self._json(404 if is_owner else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _denied(self, is_owner: bool) -> bool:
        if not is_owner:
            message = "Invalid credentials in Authorization header"
            self._json(401, {"error": message}, {"X-Error-Message": message})
        return not is_owner

    def create(self, body: bytes, is_owner: bool) -> None:
        if self._denied(is_owner):
            return
        wanted = json.loads(body)
        kind, name = wanted.get("type", "model"), f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "me":
            self._json(403, {"error": "not yours"}, {"X-Error-Message": "You don't have the rights"})
            return
        exists = (kind, name) in self.state.repos
        if not exists:
            self.state.repos[kind, name] = Repo(private=wanted.get("visibility") == "private")
        self._json(409 if exists else 200, {"url": f"{self.state.url}/{'' if kind == 'model' else 'datasets/'}{name}"})

    def info(self, body: bytes, is_owner: bool, kind: str, repo: str) -> None:
        if (found := self._repo(kind, repo, is_owner)) is not None:
            siblings = [{"rfilename": name} for name in sorted(found.files)]
            settings = {"private": found.private, "gated": found.gated}
            self._json(200, {"id": repo, "sha": found.commits[-1], "siblings": siblings, "tags": []} | settings)

    def tree(self, body: bytes, is_owner: bool, kind: str, repo: str) -> None:
        if (found := self._repo(kind, repo, is_owner)) is not None:
            entries = []
            for path, (oid, is_lfs) in sorted(found.files.items()):
                size = len(self.state.blobs[oid])
                lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 100}} if is_lfs else {}
                entries.append({"type": "file", "path": path, "size": size, "oid": oid, **lfs})
            self._json(200, entries)

    def settings(self, body: bytes, is_owner: bool, kind: str, repo: str) -> None:
        if not self._denied(is_owner) and (found := self._repo(kind, repo, is_owner)) is not None:
            wanted = json.loads(body)
            found.gated = wanted.get("gated", found.gated)
            found.private = wanted.get("visibility", "private" if found.private else "public") == "private"
            self._json(200, {})

    def validate_yaml(self, body: bytes, is_owner: bool) -> None:
        """The real one knows the fields; here: that there is front matter which is YAML, with a licence."""
        parts = json.loads(body)["content"].split("---\n")
        fields = yaml.safe_load(parts[1]) if len(parts) > 2 else {}
        is_good = isinstance(fields, dict) and isinstance(fields.get("license"), str)
        errors = [] if is_good else [{"message": "license is missing"}]
        self._json(200 if is_good else 400, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, is_owner: bool, kind: str, repo: str) -> None:
        if not self._denied(is_owner) and (found := self._repo(kind, repo, is_owner)) is not None:
            answers = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": found.files.get(file["path"], (None,))[0],
                }
                for file in json.loads(body)["files"]
            ]
            self._json(200, {"files": answers})

    def lfs_batch(self, body: bytes, is_owner: bool, kind: str, repo: str) -> None:
        if self._denied(is_owner):
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.state.url}/lfs/{wanted['oid']}"}}}
            objects.append(wanted | ({} if wanted["oid"] in self.state.blobs else upload))
        self._json(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, is_owner: bool, oid: str) -> None:
        is_whole = hashlib.sha256(body).hexdigest() == oid
        if is_whole:
            self.state.blobs[oid] = body
        self._json(200 if is_whole else 400, {})

    def commit(self, body: bytes, is_owner: bool, kind: str, repo: str) -> None:
        if self._denied(is_owner) or (found := self._repo(kind, repo, is_owner)) is None:
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.state.blobs[oid] = content
                found.files[value["path"]] = (oid, False)
            elif entry["key"] == "lfsFile":
                assert value["oid"] in self.state.blobs, "a commit of what never arrived"
                found.files[value["path"]] = (value["oid"], True)
            elif entry["key"] == "deletedFile":
                del found.files[value["path"]]
        found.commits.append(hashlib.sha1(found.commits[-1].encode() + body).hexdigest())
        sha = found.commits[-1]
        self._json(200, {"commitOid": sha, "commitUrl": f"{self.state.url}/{repo}/commit/{sha}"})

    def squash(self, body: bytes, is_owner: bool, kind: str, repo: str) -> None:
        if not self._denied(is_owner) and (found := self._repo(kind, repo, is_owner)) is not None:
            found.commits[:] = found.commits[-1:]
            self._json(200, {})

    def resolve(self, body: bytes, is_owner: bool, prefix: str, repo: str, path: str) -> None:
        found = self._repo("dataset" if prefix else "model", repo, is_owner)
        if found is None:
            return
        commit = {"X-Repo-Commit": found.commits[-1]}
        if path not in found.files:
            self._json(404, {"error": "Entry not found"}, commit | {"X-Error-Code": "EntryNotFound"})
            return
        oid, is_lfs = found.files[path]
        content = self.state.blobs[oid]
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))} if is_lfs else {}
        self._send(200, content, commit | linked | {"ETag": f'"{oid}"'})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>model|dataset)s/{_REPO}"
_ROUTES: list[tuple[str, Any]] = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"GET {_API}(?:/revision/[^/]+)?", _Handler.info),
    (rf"GET {_API}/tree/[^/]+", _Handler.tree),
    (rf"PUT {_API}/settings", _Handler.settings),
    (rf"POST {_API}/preupload/[^/]+", _Handler.preupload),
    (rf"POST {_API}/commit/[^/]+", _Handler.commit),
    (rf"POST {_API}/super-squash/[^/]+", _Handler.squash),
    (rf"POST (/(?P<kind>datasets))?/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (rf"(GET|HEAD) (?P<prefix>/datasets)?/{_REPO}/resolve/[^/]+/(?P<path>.+)", _Handler.resolve),
]
