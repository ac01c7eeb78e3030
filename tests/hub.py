"""Stand-ins for the Hugging Face Hub and for the bucket of the JAX ViTs, on loopback."""

import base64
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import constants

SHA = "a" * 40  # of the only commit


class StandIn(http.server.ThreadingHTTPServer):
    """Serves repositories: {name: {file: bytes}}; keeps the paths that were asked for.

    Attributes:
      files: bytes by name in the bucket.
      gated: names that need terms to be accepted.
      private: names that need the token "secret", which may also write what "me" owns; the token
        "reader" may not.
      branches: repositories by (name, branch), beside the main one.
      uploaded: large files by their SHA-256, before they are committed.
      damage: whether the last byte of large files and of the bucket's is another.
      status: if not 200, the answer to everything.
      asked: paths that were asked for.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.files = {}, {}
        self.gated, self.private = set(), set()
        self.branches, self.uploaded = {}, {}
        self.damage, self.status, self.asked = False, 200, []
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def close(self):
        self.shutdown()
        self._thread.join()
        self.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub, an empty cache, no token; in an empty folder."""
    server = StandIn()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    url = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    at_once = SimpleNamespace(**vars(time) | {"sleep": lambda _: None})  # before it tries again
    monkeypatch.setattr("huggingface_hub.utils._http.time", at_once)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TIMESFORMER_VIT_MODELS", f"{server.address}/bucket")
    monkeypatch.chdir(tmp_path)
    yield server
    server.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.asked.append(path)
        if self.server.status != 200:
            return self._say(self.server.status, b"{}")
        if path.startswith("/bucket/"):
            return self._bucket(path.removeprefix("/bucket/"))
        if path == "/api/whoami-v2":
            return self._json({"name": "me"}) if self._account() else self._say(401, b"{}")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        files = self.server.repositories.get(name)
        token = self.headers.get("Authorization")
        if files is None or (name in self.server.private and token != "Bearer secret"):
            return self._say(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if name in self.server.gated and path.startswith(f"/{name}"):
            return self._say(403, b"{}", {"X-Error-Code": "GatedRepo"})
        commit = SHA
        for (repository, branch), content in self.server.branches.items():
            of_branch = hashlib.sha1(branch.encode()).hexdigest()
            if repository == name and rest[1:2] in ([branch], [of_branch]):
                files, commit = content, of_branch
        if commit == SHA and rest[1:2] and rest[1] not in ("main", "v1", SHA):
            return self._say(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/"):
            if rest[:1] == ["tree"]:
                return self._json([_entry(file, content) for file, content in files.items()])
            return self._json(
                {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            )
        file = "/".join(rest[2:])
        if file not in files:
            return self._say(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[file]
        headers = {"ETag": f'"{_etag(file, content)}"', "X-Repo-Commit": commit}
        self._say(200, self._damaged(content) if _is_large(file) else content, headers)

    def do_PUT(self):
        content = self._body()
        if hashlib.sha256(content).hexdigest() != self.path.removeprefix("/lfs/"):
            return self._say(400, b"")
        self.server.uploaded[self.path.removeprefix("/lfs/")] = content
        self._say(200, b"")

    def do_POST(self):
        path, body = urllib.parse.urlsplit(self.path).path, self._body()
        self.server.asked.append(path)
        if self.server.status != 200:
            return self._say(self.server.status, b"{}")
        if path == "/api/validate-yaml":
            card = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return self._json({"errors": [] if card["tags"] else [{"message": "no tags"}]})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if self._account() != "Bearer secret":
            return self._say(403, b"{}")
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for entry in objects:
                to = {"href": f"{self.server.address}/lfs/{entry['oid']}"}
                entry["actions"] = {"upload": to}
            return self._json({"transfer": "basic", "objects": objects})
        name, action, revision = re.fullmatch(r"/api/models/(me/\w+)/(\w+)/(\w+)", path).groups()
        if action == "branch":
            self.server.branches[name, revision] = {}
            return self._json({})
        if action == "preupload":
            modes = [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if _is_large(file["path"]) else "regular"}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self._json({"files": modes})
        assert action == "commit"
        files = self.server.branches.get((name, revision), self.server.repositories[name])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploaded[value["oid"]]
        self._json({"commitUrl": f"{self.server.address}/{name}/commit/{SHA}", "commitOid": SHA})

    def _create(self, asked):
        owner = asked["organization"] or "me"
        name = f"{owner}/{asked['name']}"
        if self._account() != "Bearer secret" or owner != "me":
            return self._say(403, b'{"error": "You don\'t have the rights to create a model"}')
        answer = {"url": f"{self.server.address}/{name}", "name": name, "id": "1"}
        if name in self.server.repositories:
            return self._json(answer, 409)
        self.server.repositories[name] = {}
        if asked.get("visibility") == "private":
            self.server.private.add(name)
        self._json(answer)

    def _account(self):
        """The token, if it is one of the account "me"."""
        token = self.headers.get("Authorization")
        return token if token in ("Bearer secret", "Bearer reader") else None

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _bucket(self, name):
        if name not in self.server.files:
            return self._say(404, b"<Error/>")
        content = self.server.files[name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        self._say(200, self._damaged(content), {"x-goog-hash": f"crc32c=AAAAAA==,md5={md5}"})

    def _damaged(self, content):
        return content[:-1] + bytes([content[-1] ^ 1]) if self.server.damage else content

    def _json(self, value, status=200):
        self._say(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _say(self, status, body, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _is_large(file):
    return file.endswith((".safetensors", ".bin", ".npz"))


def _etag(file, content):
    """As on the Hub: SHA-256 of large files, git's SHA-1 of others."""
    if _is_large(file):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(file, content):
    entry = {"type": "file", "path": file, "size": len(content), "oid": "b" * 40}
    if _is_large(file):
        sha = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
    return entry
