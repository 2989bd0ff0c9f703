"""A hub on the loopback interface that speaks what ``huggingface_hub`` asks of the real one, and misbehaves on request.

The library under test is the real one, pointed here by ``HF_ENDPOINT``. As with the real hub, the bytes come from
another host (``localhost`` instead of ``127.0.0.1``), to which the hub redirects.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from tests.support import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_goodtokenofthetests"


@dataclass
class Repository:
    """Files by path; what the listing says of them can be overridden."""

    files: Mapping[str, bytes]
    commit: str = COMMIT
    gated: int = 0  # the status that content is refused with, 401 or 403, unless the token is right
    announced: dict[str, dict[str, Any]] = field(default_factory=dict)  # path -> changes to its entry of the listing
    damage: int | None = None  # offset of a byte that is sent wrongly
    listing: tuple[int, bytes] | None = None  # status and body that are answered instead of a listing
    small: tuple[str, ...] = ("config.json", "README.md")  # not LFS: hashed as git does

    def entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob}
        if path not in self.small:
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 135}
        return entry | self.announced.get(path, {})


class FakeHub:
    """The server; a context manager.

    Attributes:
        repositories: by "org/name".
        requests: (method, path with query, headers) of each, in order.
        sent: bytes of content that went out.
        cuts: each content request takes the first and closes the connection after so many bytes.
        stall_after: bytes of content after which sending waits until :attr:`go` is set.
        knows_ranges: whether content can be asked for in parts.
        statuses: content requests are refused with the first of them, as long as there is one.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.sent = 0
        self.cuts: list[int] = []
        self.stall_after: int | None = None
        self.stalled = threading.Event()
        self.go = threading.Event()
        self.knows_ranges = True
        self.statuses: list[int] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            fake = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Of a process that takes this for the hub and keeps its cache in ``home``."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        kept |= {"HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(home)}
        kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return kept | more

    def contents(self) -> list[tuple[str, dict[str, str]]]:
        """Path and headers of the requests for content, as the hub (not the other host) got them."""
        return [(path, headers) for _, path, headers in self.requests if "/resolve/" in path]

    def ranges(self) -> list[str]:
        return [headers.get("range", "") for _, headers in self.contents()]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        fake, url = self.fake, urlsplit(self.path)
        with fake.lock:
            fake.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        path = unquote(url.path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._list(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._content(fake.repositories[match[1]], match[2], body)
        else:
            self._send(404, b"nothing here")

    def _known(self, name: str, revision: str | None) -> Repository | None:
        repository = self.fake.repositories.get(name)
        if repository is None:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif revision not in (None, "main", "v1", repository.commit):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            return repository
        return None

    def _list(self, name: str, revision: str | None) -> None:
        repository = self._known(name, revision)
        if repository is not None and repository.listing is not None:
            self._send(*repository.listing)
        elif repository is not None:
            siblings = [repository.entry(path) for path in repository.files]
            listing = {"id": name, "sha": repository.commit, "private": False, "siblings": siblings, "tags": []}
            self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._known(name, revision)
        if repository is None:
            return
        if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(repository.gated, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif path not in repository.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif self.fake.statuses:
            self._send(self.fake.statuses.pop(0), b"busy")
        else:
            entry = repository.entry(path)
            etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
            target = f"http://localhost:{self.fake.port}/cdn/{name}/{path}"
            headers = {"Location": target, "X-Repo-Commit": repository.commit, "X-Linked-Etag": f'"{etag}"'}
            self._send(302, b"", headers | {"X-Linked-Size": str(entry["size"])})

    def _content(self, repository: Repository, path: str, body: bool) -> None:
        fake, data = self.fake, bytearray(repository.files[path])
        if repository.damage is not None:
            data[repository.damage] ^= 1
        start, end, status = 0, len(data), 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": '"of-another-host"'}
        if match and fake.knows_ranges:
            start, end, status = int(match[1]), min(len(data), int(match[2] or len(data)) + 1), 206
            if start >= len(data):
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(end - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        with fake.lock:
            cut = fake.cuts.pop(0) if fake.cuts else None
        if body:
            self._send_slowly(memoryview(data)[start:end], cut)

    def _send_slowly(self, data: memoryview, cut: int | None) -> None:
        fake, done = self.fake, 0
        stop = len(data) if cut is None else min(cut, len(data))
        try:
            while done < stop:
                if fake.stall_after is not None and done >= fake.stall_after:
                    fake.stalled.set()
                    if not fake.go.wait(30):
                        return
                step = min(stop - done, 32768)
                self.wfile.write(data[done : done + step])
                done += step
                with fake.lock:
                    fake.sent += step
        except (BrokenPipeError, ConnectionResetError):
            pass
        if done < len(data):
            self.close_connection = True
            time.sleep(0.01)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
