"""A fake Google Cloud Storage for tests: a server of the files in a local folder.

TensorFlow and TensorStore have the names of Google's hosts compiled in. So the server is also an
HTTPS proxy: it answers a CONNECT to these hosts itself. Its certificate is trusted through
environment variables. It implements the part of
https://cloud.google.com/storage/docs/json_api/v1 that the two libraries use. It refuses all other
requests with status 400, after which no client retries.
"""

import collections
import dataclasses
import json
import os
import pathlib
import ssl
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest
import trustme

HOSTS = ("www.googleapis.com", "storage.googleapis.com")
BUCKET = "bucket"  # exists from the start; any other folder in the root is a bucket too
PAGE = 1000  # largest number of entries in one response to a listing

# The object "a/", with which clients mark an empty folder, is stored as the file "a/.folder".
FOLDER_MARKER = ".folder"


@dataclasses.dataclass(frozen=True)
class Gcs:
    """A running server.

    Attributes:
      root: gs://BUCKET/OBJECT is the file BUCKET/OBJECT in this folder; tests use it.
      environment: variables with which another process uses it as Google Cloud Storage.
      sent: the bytes of each object that were sent so far, by the object's name.
    """

    root: pathlib.Path
    environment: Mapping[str, str]
    sent: Mapping[str, int]


@pytest.fixture
def gcs(tmp_path):
    """A server with the empty bucket gs://bucket."""
    with serve(tmp_path / "gcs") as running:
        yield running


@contextmanager
def serve(folder: pathlib.Path) -> Iterator[Gcs]:
    """Runs a server with its files in a new folder."""
    (folder / "root" / BUCKET).mkdir(parents=True)
    authority, bundle = trustme.CA(), folder / "authority.pem"
    authority.cert_pem.write_to_path(bundle)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*HOSTS).configure_cert(tls)
    with _Server(_Store(folder / "root"), tls) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield Gcs(folder / "root", _environment(server.server_port, bundle), server.sent)
        finally:
            server.shutdown()
            thread.join()


def _environment(port: int, bundle: pathlib.Path) -> dict[str, str]:
    proxy = f"http://127.0.0.1:{port}"
    return {
        "HTTPS_PROXY": proxy,
        "https_proxy": proxy,
        "NO_PROXY": "",
        "no_proxy": "",
        "CURL_CA_BUNDLE": str(bundle),
        "TENSORSTORE_CA_BUNDLE": str(bundle),
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
        "GCS_RETRY_CONFIG_MAX_DELAY_TIME_US": "100000",  # fail soon
        "STORAGE_EMULATOR_HOST": proxy,  # for google-cloud-storage, which Orbax uses
    }


class _Refused(Exception):
    """A response other than success: HTTP status and reason."""


class _Store:
    """Objects as files. Changes are atomic. The generation is the file's modification time."""

    def __init__(self, root: pathlib.Path):
        self._root = root
        self._lock = threading.Lock()

    def bucket(self, bucket: str) -> pathlib.Path:
        path = self._root / bucket
        if bucket in ("", ".", "..") or not path.is_dir():
            raise _Refused(404, f"no bucket {bucket}")
        return path

    def metadata(self, bucket: str, name: str, query: Mapping[str, str]) -> dict[str, str]:
        with self._open(bucket, name, query) as file:
            return _metadata(name, os.fstat(file.fileno()))

    def read(
        self, bucket: str, name: str, query: Mapping[str, str]
    ) -> tuple[bytes, dict[str, str]]:
        """The content and the metadata."""
        with self._open(bucket, name, query) as file:
            return file.read(), _metadata(name, os.fstat(file.fileno()))

    def write(
        self, bucket: str, name: str, query: Mapping[str, str], content: bytes
    ) -> dict[str, str]:
        path = self._path(bucket, name)
        new = self._root.parent / "new"
        with self._lock:
            _check_generation(path, query)
            new.write_bytes(content)
            os.utime(new, ns=(time.time_ns(),) * 2)  # the file system's clock is coarser
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                new.replace(path)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                raise _Refused(400, f"a part of the path {name} is a file") from None
            return _metadata(name, path.stat())

    def delete(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        path = self._path(bucket, name)
        with self._lock:
            _check_generation(path, query)
            if not path.is_file():
                raise _Refused(404, f"no object {name}")
            path.unlink()
            with suppress(OSError):  # remove empty folders
                for folder in path.parents[: name.count("/")]:
                    folder.rmdir()

    def page(self, bucket: str, query: Mapping[str, str]) -> dict[str, object]:
        """A page of the objects with a prefix, grouped by their names up to a delimiter."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        begin, end = query.get("startOffset", ""), query.get("endOffset")
        with self._lock:
            files = {self._name(bucket, path): path.stat() for path in self._files(bucket)}
        entries = {}  # None for a group
        for name in sorted(files):
            if not name.startswith(prefix) or name < begin or (end and name >= end):
                continue
            if delimiter and delimiter in name[len(prefix) :]:
                entries[name[: name.index(delimiter, len(prefix)) + len(delimiter)]] = None
            else:
                entries[name] = _metadata(name, files[name])
        rest = [name for name in entries if name > query.get("pageToken", "")]
        shown = rest[: min(PAGE, int(query.get("maxResults", PAGE)))]
        return {
            "items": [entries[name] for name in shown if entries[name]],
            "prefixes": [name for name in shown if not entries[name]],
        } | ({"nextPageToken": shown[-1]} if shown != rest else {})

    def _open(self, bucket: str, name: str, query: Mapping[str, str]):
        path = self._path(bucket, name)
        with self._lock:
            _check_generation(path, query)
            if not path.is_file():
                raise _Refused(404, f"no object {name}")
            return open(path, "rb")

    def _files(self, bucket: str) -> list[pathlib.Path]:
        return [path for path in self.bucket(bucket).rglob("*") if path.is_file()]

    def _name(self, bucket: str, path: pathlib.Path) -> str:
        name = path.relative_to(self._root / bucket).as_posix()
        return name.removesuffix(FOLDER_MARKER) if path.name == FOLDER_MARKER else name

    def _path(self, bucket: str, name: str) -> pathlib.Path:
        *folders, last = name.split("/")
        if not name or {"", ".", "..", FOLDER_MARKER} & {*folders, last or "any"}:
            raise _Refused(400, f"no file can represent an object of the name {name!r}")
        return self.bucket(bucket).joinpath(*folders, last or FOLDER_MARKER)


def _metadata(name: str, status: os.stat_result) -> dict[str, str]:
    updated = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="milliseconds")
    return {
        "name": name,
        "size": str(status.st_size),
        "generation": str(status.st_mtime_ns),
        "updated": updated.replace("+00:00", "Z"),
    }


def _check_generation(path: pathlib.Path, query: Mapping[str, str]) -> None:
    generation = str(path.stat().st_mtime_ns) if path.is_file() else "0"
    if query.get("ifGenerationMatch", generation) != generation:
        raise _Refused(412, f"the generation is {generation}")
    if query.get("ifGenerationNotMatch") == generation:
        raise _Refused(304, f"the generation is {generation}")


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # many readers connect at once; one that is refused waits a second

    def __init__(self, store: _Store, tls: ssl.SSLContext):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = store
        self.tls = tls
        self.uploads: dict[str, dict | None] = {}  # by id; metadata once complete
        self.sent: collections.Counter[str] = collections.Counter()

    def handle_error(self, *arguments):
        if not isinstance(sys.exc_info()[1], ConnectionError | ssl.SSLError):  # disconnected
            super().handle_error(*arguments)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_CONNECT(self):
        if self.path not in [f"{host}:443" for host in HOSTS]:
            self._send(403, f"{self.path} is not Google Cloud Storage".encode())
            return
        self.send_response(200)
        self.end_headers()
        self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        self.setup()  # continue with the connection inside the tunnel
        self.close_connection = False  # some clients use HTTP/1.0 for CONNECT

    def finish(self):
        super().finish()
        self.request.close()  # the server closes only the outer socket

    def log_message(self, *_):
        pass

    def _answer(self):
        try:
            self._route(self._body())
        except _Refused as refused:
            status, reason = refused.args
            self._send(status, b"" if status == 304 else reason.encode())

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def _route(self, body: bytes):
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        store = self.server.store
        # A slash in an object's name is escaped.
        match [self.command, *map(unquote, url.path.split("/")[1:])]:
            case "GET", "storage", "v1", "b", bucket:
                store.bucket(bucket)
                self._send_json({"name": bucket, "location": "EU"})
            case "GET", "storage", "v1", "b", bucket, "storageLayout":
                store.bucket(bucket)
                self._send_json({"bucket": bucket, "hierarchicalNamespace": {"enabled": False}})
            case "GET", "storage", "v1", "b", bucket, "o":
                self._send_json(store.page(bucket, query))
            case "GET", "storage", "v1", "b", bucket, "o", name if query.get("alt") == "media":
                self._send_object(*store.read(bucket, name, query))
            case "GET", "storage", "v1", "b", bucket, "o", name:
                self._send_json(store.metadata(bucket, name, query))
            case "GET", bucket, name:
                self._send_object(*store.read(bucket, name, query))
            case "DELETE", "storage", "v1", "b", bucket, "o", name:
                store.delete(bucket, name, query)
                self._send(204)
            case "POST", "storage", "v1", "b", bucket, "o", name, "rewriteTo", "b", other, "o", to:
                content, _ = store.read(bucket, name, {})
                store.write(other, to, query, content)
                self._send_json({"done": True})
            case "POST", "upload", "storage", "v1", "b", bucket, "o":
                if query["uploadType"] == "resumable":
                    store.bucket(bucket)
                    self.server.uploads[upload := uuid.uuid4().hex] = None
                    name = quote(query["name"], safe="")
                    location = f"https://{HOSTS[0]}{url.path}?upload_id={upload}&name={name}"
                    self._send(200, Location=location)
                elif query["uploadType"] == "media":
                    self._send_json(store.write(bucket, query["name"], query, body))
                else:
                    raise _Refused(400, f"the server does not implement {self.path}")
            case "PUT", "upload", "storage", "v1", "b", bucket, "o":
                self._receive_upload(bucket, query, body)
            case _:
                raise _Refused(400, f"the server does not implement {self.command} {self.path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self._read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline() or b"0", 16):
            chunks.append(self._read(size + 2)[:-2])  # each ends with CRLF
        self._read(2)
        return b"".join(chunks)

    def _read(self, size: int) -> bytes:
        read = self.rfile.read(size)
        if len(read) < size:
            raise ConnectionAbortedError
        return read

    def _receive_upload(self, bucket: str, query: Mapping[str, str], body: bytes):
        """The second part of a resumable upload: the content, or a query of its progress."""
        uploads, upload = self.server.uploads, query["upload_id"]
        if upload not in uploads:
            raise _Refused(404, "no such upload")
        span = self.headers.get("Content-Range", "")
        if span.startswith("bytes */"):
            if not uploads[upload]:
                raise _Refused(308, "nothing was received")
        elif body and span != f"bytes 0-{len(body) - 1}/{len(body)}":
            raise _Refused(400, f"the server takes an upload in one part, not {span}")
        else:
            uploads[upload] = self.server.store.write(bucket, query["name"], {}, body)
        self._send_json(uploads[upload])

    def _send_object(self, content: bytes, metadata: Mapping[str, str]):
        """Sends the object, or the range of it in the header "Range: bytes=FIRST-LAST"."""
        headers = {"X-Goog-Generation": metadata["generation"]}
        if "Range" not in self.headers:
            self.server.sent[metadata["name"]] += len(content)
            self._send(200, content, **headers)
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        if not first:  # "-N" means the last N bytes
            first, last = max(len(content) - int(last), 0), ""
        part = content[int(first) : int(last) + 1 if last else None]
        if not part:
            raise _Refused(416, f"{metadata['name']} has {len(content)} bytes")
        self.server.sent[metadata["name"]] += len(part)
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self._send(206, part, **headers, **{"Content-Range": span})

    def _send_json(self, value: object):
        self._send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes = b"", **headers: str):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
