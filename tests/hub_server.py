"""A small Hugging Face hub on localhost: repo info, paged trees, resolve with redirect to a "CDN"
of another origin, ranges, faults.

with HubServer() as hub:
    hub.repos["owner/name"] = {"folder/file.npy": b"..."}
    hub.faults["folder/file.npy"] = ["cut:100", "status:503"]  # one a request for it, in turn
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "c0ffee" + "0" * 34
# endings that the hub keeps as LFS files
LARGE = (".npy", ".pt", ".7z", *(f".{i:03d}" for i in range(1, 100)))
PAGE = 4  # entries of a page of the tree


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer(ThreadingHTTPServer):
    """`repos`: {id: {path: content}}; `faults`: {path, "tree" or "info": [fault, ...]}, first come
    first served.

    Faults: cut:N (connection closed after N bytes), wrong (a changed byte), whole (all of it, even
    if a range was asked for), status:N, status:429 with Retry-After 1, limited:N (429 with the rest
    of the rate limit's window), truncate:N (the file ends there, for good manners and for all),
    longer:N (N bytes more),
    missing (404). A last fault with a trailing "!" stays for ever.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.faults, self.log = {}, {}, []
        self.token, self.lock = None, threading.Lock()
        # (entries, address of the next page, of this) -> (entries, address) that are sent instead
        self.change_page, self.change_info = None, None
        self.sha256 = {}  # path -> sha256 to claim instead of the true one

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def next_fault(self, name):
        with self.lock:
            waiting = self.faults.get(name, [])
            fault = waiting[0] if waiting else ""
            if waiting and not fault.endswith("!"):
                waiting.pop(0)
        return fault.rstrip("!")

    def contents(self):
        """(path, first byte) of every request for the content of a file."""
        return [(path, start) for kind, path, start, _ in self.log if kind == "content"]

    def handle_error(self, *_):
        pass  # clients that hang up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 2**16, True  # or each answer takes 40 ms

    def log_message(self, *_):
        pass

    def note(self, kind, path="", start=0):
        with self.server.lock:
            self.server.log.append((kind, path, start, self.headers.get("Authorization")))

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def failed(self, fault):
        """Answer with the status that a fault asks for, if it asks for one."""
        if fault == "missing":
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        elif fault.startswith("status:"):
            status = int(fault.partition(":")[2])
            self.answer(status, **({"Retry_After": "1"} if status == 429 else {}))
        elif fault.startswith("limited:"):
            self.answer(429, RateLimit=f'"resolvers";r=0;t={fault.partition(":")[2]}')
        return fault.startswith(("missing", "status:", "limited:"))

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlparse(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if path.startswith("/cdn/"):
            return self.content(path[len("/cdn/") :])
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(
                401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
            )
        for repo, files in self.server.repos.items():
            if path.startswith(f"/api/datasets/{repo}/tree/"):
                return self.tree(files, path.partition("/tree/")[2].partition("/")[2], query)
            if path == f"/api/datasets/{repo}":
                self.note("info")
                told = {"id": repo, "sha": COMMIT}
                if self.server.change_info:
                    told = self.server.change_info(told)
                failed = self.failed(self.server.next_fault("info"))
                return failed or self.answer(200, json.dumps(told).encode())
            if path.startswith(f"/datasets/{repo}/resolve/"):
                return self.resolve(repo, files, path.partition("/resolve/")[2].partition("/")[2])
        self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def tree(self, files, folder, query):
        self.note("tree")
        if self.failed(self.server.next_fault("tree")):
            return
        paths = sorted(p for p in files if not folder or p.startswith(folder + "/"))
        if not paths:
            return self.answer(404, X_Error_Code="EntryNotFound")
        first = int(query.get("cursor", ["0"])[0])
        entries = [self.entry(path, files[path]) for path in paths[first : first + PAGE]]
        if first == 0:
            entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": "a folder"})
        here = f"{self.server.url}{urlparse(self.path).path}"
        following = (
            f"{here}?recursive=true&cursor={first + PAGE}" if first + PAGE < len(paths) else ""
        )
        if self.server.change_page:
            entries, following = self.server.change_page(entries, following, here)
        more = {"Link": f'<{following}>; rel="next"'} if following else {}
        self.answer(200, json.dumps(entries).encode(), Content_Type="application/json", **more)

    def entry(self, path, data):
        found = {"type": "file", "oid": git_sha1(data), "size": len(data), "path": path}
        if path.endswith(LARGE):
            sha256 = self.server.sha256.get(path, hashlib.sha256(data).hexdigest())
            found["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return found

    def resolve(self, repo, files, path):
        self.note("resolve", path)
        if path not in files:
            return self.failed("missing")
        if not path.endswith(LARGE):
            return self.content(f"{repo}/{path}")
        data = files[path]
        linked = {
            "X_Linked_Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X_Linked_Size": str(len(data)),
        }
        self.answer(
            302,
            Location=f"http://localhost:{self.server.server_port}/cdn/{repo}/{path}",
            X_Repo_Commit=COMMIT,
            **linked,
        )

    def content(self, name):
        owner, repo, path = name.split("/", 2)
        data, fault = self.server.repos[f"{owner}/{repo}"][path], ""
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if self.command == "GET":
            self.note("content", path, start)
            fault = self.server.next_fault(path)
        if self.failed(fault):
            return
        kind, _, number = fault.partition(":")
        if kind == "whole":
            start = 0
        if kind == "wrong":
            data = bytes([data[0] ^ 1]) + data[1:]
        if kind == "truncate":
            data = data[: int(number)]
        if kind == "longer":
            data = data + bytes(int(number))
        if start >= len(data) > 0:
            return self.answer(416, Content_Range=f"bytes */{len(data)}")
        etag = {"ETag": f'"{git_sha1(data)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        ranged = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        if kind == "cut":
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : start + int(number)])
            self.close_connection = True
            return
        self.answer(206 if start else 200, data[start:], **etag, **ranged)
