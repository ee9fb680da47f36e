"""A Hub on this machine: as much of its HTTP interface as a push needs."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Writes the files of `org/NAME` into `folder / NAME`, and keeps those of each commit in `commits`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: list[dict[str, bytes]] = []


@contextlib.contextmanager
def serve_hub(folder: Path) -> Iterator[FakeHub]:
    server = FakeHub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer({"error": "Entry not found"}, status=404)

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        repository = self.path.split("/")[-3]  # /api/models/org/NAME/{preupload,commit}/main
        url = f"{self.server.url}/org"
        if self.path.endswith("/repos/create"):
            name = json.loads(body)["name"]
            self.answer({"url": f"{url}/{name}", "name": f"org/{name}", "id": f"org/{name}"})
        elif "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            for name, content in self.server.commits[-1].items():
                path = self.server.folder / repository / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{url}/{repository}/commit/{COMMIT}"})
        else:
            self.answer({"valid": True})
