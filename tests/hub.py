"""Stand-ins for the Hugging Face Hub and for the bucket of the JAX ViTs, on loopback."""

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse

SHA = "a" * 40  # of the only commit


class StandIn(http.server.ThreadingHTTPServer):
    """Serves repositories: {name: {file: bytes}}; keeps the paths that were asked for.

    Attributes:
      files: bytes by name in the bucket.
      gated: names that need terms to be accepted.
      private: names that need the token "secret".
      damage: whether the last byte of large files and of the bucket's is another.
      status: if not 200, the answer to everything.
      asked: paths that were asked for.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.files = {}, {}
        self.gated, self.private = set(), set()
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
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        files = self.server.repositories.get(name)
        token = self.headers.get("Authorization")
        if files is None or (name in self.server.private and token != "Bearer secret"):
            return self._say(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if name in self.server.gated and path.startswith(f"/{name}"):
            return self._say(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if rest[1:2] and rest[1] not in ("main", "v1", SHA):
            return self._say(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/"):
            if rest[:1] == ["tree"]:
                return self._json([_entry(file, content) for file, content in files.items()])
            return self._json(
                {"id": name, "sha": SHA, "siblings": [{"rfilename": f} for f in files]}
            )
        file = "/".join(rest[2:])
        if file not in files:
            return self._say(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        content = files[file]
        headers = {"ETag": f'"{_etag(file, content)}"', "X-Repo-Commit": SHA}
        self._say(200, self._damaged(content) if _is_large(file) else content, headers)

    def _bucket(self, name):
        if name not in self.server.files:
            return self._say(404, b"<Error/>")
        content = self.server.files[name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        self._say(200, self._damaged(content), {"x-goog-hash": f"crc32c=AAAAAA==,md5={md5}"})

    def _damaged(self, content):
        return content[:-1] + bytes([content[-1] ^ 1]) if self.server.damage else content

    def _json(self, value):
        self._say(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _say(self, status, body, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
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
