"""A hub on the loopback address: as much of huggingface.co's API as its clients ask for."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"api/(models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]*)/([^/]+)/?(.*))?")
FILE = re.compile(r"(?:(datasets)/)?([^/]+/[^/]+)/(resolve)/([^/]+)/(.*)")


class Hub(ThreadingHTTPServer):
    """`repositories` is {"models/owner/name": {revision: {path: bytes}}}, of which the first
    revision is `main` too. The `gated` answer with that status; `broken` files break off."""

    daemon_threads = True

    def __init__(self, repositories: dict, gated: dict, broken: tuple):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.gated, self.broken = repositories, gated, broken
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def give(self, body: bytes, status: int = 200, broken: bool = False, **headers) -> None:
        """From where the client says (a Range) to the end, or never further than the middle."""
        start = int(re.sub(r"bytes=(\d+)-.*", r"\1", self.headers["range"] or "bytes=0-"))
        if start:
            status, headers["content_range"] = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send_response(status)
        for name, value in ({"content_length": len(body) - start} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[start : len(body) // 2 if broken else None])
        self.close_connection |= broken

    def refuse(self, status: int, code: str) -> None:
        self.give(b"{}", status, X_Error_Code=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        self.do_GET((json.loads(body) if body.startswith("{") else parse_qs(body))["paths"])

    def do_GET(self, wanted: list[str] | None = None) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path).strip("/")
        asked = API.fullmatch(path) or FILE.fullmatch(path)
        kind, name, what, revision, inside = asked.groups() if asked else [None] * 5
        repository = f"{kind or 'models'}/{name}"
        if repository in hub.gated:
            return self.refuse(hub.gated[repository], "GatedRepo")
        if repository not in hub.repositories:
            return self.refuse(401, "RepoNotFound")
        revisions = hub.repositories[repository]
        known = {"main": next(iter(revisions))} | {some: some for some in revisions}
        known |= {commit(repository, some): some for some in revisions}
        if (revision or "main") not in known:
            return self.refuse(404, "RevisionNotFound")
        revision = known[revision or "main"]
        files, sha = revisions[revision], commit(repository, revision)
        if what == "resolve":
            if inside not in files:
                return self.refuse(404, "EntryNotFound")
            tag = f'"{hashlib.sha1(files[inside]).hexdigest()}"'
            broken = f"{repository}/{inside}" in hub.broken
            return self.give(files[inside], broken=broken, ETag=tag, X_Repo_Commit=sha)
        entries = [
            dict(type="file", path=p, size=len(body), oid=hashlib.sha1(body).hexdigest())
            for p, body in files.items()
            if (p in wanted if wanted else p.startswith(inside or ""))
        ]
        about = dict(id=name, sha=sha, siblings=[dict(rfilename=p) for p in files])
        self.give(json.dumps(entries if what in ("tree", "paths-info") else about).encode())


def commit(repository: str, revision: str) -> str:
    """A revision that looks like a commit is one; another has one."""
    made = hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()
    return revision if len(revision) == 40 else made
