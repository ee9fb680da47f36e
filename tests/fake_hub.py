"""A Hub on this machine: the HTTP endpoints that huggingface_hub uses for pushes and pulls, over files in memory.

With LFS on request (single and multipart uploads, no Xet), revisions and tags, tokens, and failures on demand: a
status, or an upload whose connection breaks after some bytes.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Failure:
    """What happens to requests whose `METHOD /path` matches, the first so many times."""

    pattern: str
    status: int | None = None  # None: the connection breaks
    after_bytes: int = 0  # of the body before it breaks
    times: int = 1


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)  # of its first commit
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(init=False)  # all files of each, in order
    tags: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})  # and pull requests, refs/pr/N

    def __post_init__(self) -> None:
        self.commits = {COMMIT: self.files}

    def resolve(self, revision: str) -> str | None:
        named = {**self.tags, **self.branches}
        return named.get(revision, revision if revision in self.commits else None)


class FakeHub(ThreadingHTTPServer):
    """Writes the files of `org/NAME` into `folder / NAME`, and keeps those of each commit in `commits`.

    Args:
        folder (`Path`): For the files of the newest commits to `main`.
        lfs (`bool`): Take `.safetensors` through LFS.
        part_bytes (`int`, *optional*): Uploads larger than this go in parts.
    """

    def __init__(self, folder: Path, *, lfs: bool = False, part_bytes: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.lfs = lfs
        self.part_bytes = part_bytes
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: list[dict[str, bytes]] = []
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.roles: dict[str, str] | None = None  # "read" or "write" by token; None lets everybody in
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.received: Counter[str] = Counter()  # bytes of LFS bodies, whole or not, by path


@contextlib.contextmanager
def serve_hub(folder: Path, *, lfs: bool = False, part_bytes: int | None = None) -> Iterator[FakeHub]:
    server = FakeHub(folder, lfs=lfs, part_bytes=part_bytes)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_at(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process take it for the Hub, as `HF_ENDPOINT`, `HF_HUB_DISABLE_XET` and the like tell a fresh one."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.route({r"/api/models/(.+)/tree/([^/]+)": self.tree, **self.READS})

    def do_HEAD(self) -> None:
        self.route(self.READS)

    def do_PUT(self) -> None:
        self.route({r"/lfs/(\w{64})(?:/(\d+))?": self.receive})

    def do_POST(self) -> None:
        self.route(
            {
                r"/api/repos/create": self.create,
                r"/api/models/(.+)/preupload/([^/]+)": self.preupload,
                r"/api/models/(.+)/commit/([^/]+)": self.commit,
                r"/api/models/(.+)/branch/([^/]+)": self.branch,
                r"/api/models/(.+)/tag/([^/]+)": self.tag,
                r"/(.+)\.git/info/lfs/objects/batch": self.batch,
                r"/lfs/(\w{64})": self.complete,
                r"/lfs/verify": self.verify,
                r"/api/validate-yaml": lambda: self.answer({"errors": [], "warnings": []}),
            }
        )

    @property
    def READS(self) -> dict:
        return {
            r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?": self.info,
            r"/api/models/([^/]+/[^/]+)/refs": self.refs,
            r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self.file,
        }

    # --- what every request passes through ---------------------------------------------------------------------------

    def route(self, routes: dict) -> None:
        path = urlsplit(self.path).path
        asked = f"{self.command} {path}"
        self.server.requests.append(asked)
        self.failure = next((f for f in self.server.failures if f.times and re.search(f.pattern, asked)), None)
        if self.failure is not None:
            self.failure.times -= 1
            if self.failure.status is not None:
                self.body()
                return self.answer({"error": "on demand"}, self.failure.status)
        for pattern, handle in routes.items():
            if found := re.fullmatch(pattern, path):
                if self.allowed(path):
                    handle(*(unquote(group) if group is not None else None for group in found.groups()))
                return None
        self.body()
        return self.answer({"error": "Entry not found"}, 404)

    def allowed(self, path: str) -> bool:
        """As on the Hub: 401 for a token that nobody has, 403 for a write with a token that may read. LFS has none."""
        if self.server.roles is None or path.startswith("/lfs/"):
            return True
        role = self.server.roles.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        reads = self.command in ("GET", "HEAD") or path == "/api/validate-yaml"
        if role is None or (role == "read" and not reads):
            self.body()
            self.answer({"error": "no access"}, 401 if role is None else 403)
            return False
        return True

    def body(self) -> bytes:
        """The request's body; where the connection is to break, what came before."""
        length = int(self.headers["Content-Length"] or 0)
        breaks = self.failure is not None and self.failure.status is None
        return self.rfile.read(min(length, self.failure.after_bytes) if breaks else length)

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- repositories ------------------------------------------------------------------------------------------------

    def create(self) -> None:
        asked = json.loads(self.body())
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"org/{asked['name']}"
        answer = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        known = name in self.server.repositories
        if not known:
            self.server.repositories[name] = Repository(private=asked.get("visibility") == "private")
        self.answer(answer, 409 if known else 200)

    def repository(self, name: str, revision: str | None) -> tuple[Repository, str] | None:
        """A repository and a commit of it; without one the request is answered."""
        found = self.server.repositories.get(name)
        if found is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        commit = found.resolve(revision or "main")
        if commit is None and revision is not None:
            self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
            return None
        return found, commit or ""

    def info(self, name: str, revision: str | None) -> None:
        if found := self.repository(name, revision):
            repository, commit = found
            files = [{"rfilename": path} for path in repository.commits.get(commit, {})]
            self.answer({"id": name, "sha": commit, "private": repository.private, "tags": [], "siblings": files})

    def tree(self, name: str, revision: str) -> None:
        if found := self.repository(name, revision):
            files = found[0].commits[found[1]]
            self.answer([self.entry(path, content) for path, content in files.items()])

    def entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
        if self.is_lfs(path):
            lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entry["lfs"] = lfs
        return entry

    def is_lfs(self, path: str) -> bool:
        return self.server.lfs and path.endswith(".safetensors")

    def file(self, name: str, revision: str, path: str) -> None:
        found = self.repository(name, revision)
        if found is None:
            return None
        repository, commit = found
        if path not in repository.commits[commit]:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = repository.commits[commit][path]
        self.send_response(200)
        etag = hashlib.sha256(content).hexdigest() if self.is_lfs(path) else _git_hash(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Content-Length": str(len(content))}
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
        return None

    # --- uploads -----------------------------------------------------------------------------------------------------

    def preupload(self, name: str, revision: str) -> None:
        files = json.loads(self.body())["files"]
        repository = self.server.repositories.setdefault(name, Repository())
        there = repository.commits[repository.resolve(revision) or ""]
        answers = []
        for file in files:
            path = file["path"]
            answer = {**file, "uploadMode": "lfs" if self.is_lfs(path) else "regular", "shouldIgnore": False}
            if path in there:
                content = there[path]
                lfs = self.is_lfs(path)
                answer["oid"] = hashlib.sha256(content).hexdigest() if lfs else _git_hash(content)
            answers.append(answer)
        self.answer({"files": answers})

    def batch(self, name: str) -> None:
        wanted = json.loads(self.body())["objects"]
        self.answer({"transfer": "basic", "objects": [{**asked, **self.upload_actions(asked)} for asked in wanted]})

    def upload_actions(self, asked: dict) -> dict:
        oid, size, part_bytes = asked["oid"], asked["size"], self.server.part_bytes
        if oid in self.server.objects:
            return {}
        upload: dict = {"href": f"{self.server.url}/lfs/{oid}"}
        if part_bytes is not None and size > part_bytes:
            count = -(-size // part_bytes)
            parts = {f"{number:05}": f"{upload['href']}/{number}" for number in range(1, count + 1)}
            upload["header"] = {"chunk_size": str(part_bytes), **parts}
        return {"actions": {"upload": upload, "verify": {"href": f"{self.server.url}/lfs/verify"}}}

    def receive(self, oid: str, part: str | None) -> None:
        body = self.body()
        self.server.received[oid] += len(body)
        if self.failure is not None:
            self.close_connection = True
            return None
        if part is not None:
            self.server.parts[oid, int(part)] = body
        elif hashlib.sha256(body).hexdigest() != oid:
            return self.answer({"error": "wrong hash"}, 400)
        else:
            self.server.objects[oid] = body
        return self.answer({}, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body())["parts"]]
        content = b"".join(self.server.parts[oid, number] for number in numbers)
        right = hashlib.sha256(content).hexdigest() == oid
        if right:
            self.server.objects[oid] = content
        self.answer({}, 200 if right else 400)

    def verify(self) -> None:
        asked = json.loads(self.body())
        self.answer({}, 200 if len(self.server.objects.get(asked["oid"], b"")) == asked["size"] else 400)

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().decode().splitlines()]
        by_kind: dict[str, list[dict]] = {}
        for line in lines:
            by_kind.setdefault(line["key"], []).append(line["value"])
        files = {value["path"]: base64.b64decode(value["content"]) for value in by_kind.get("file", ())}
        files |= {value["path"]: self.server.objects[value["oid"]] for value in by_kind.get("lfsFile", ())}
        deleted = {value["path"] for value in by_kind.get("deletedFile", ())}
        repository = self.server.repositories.setdefault(name, Repository())
        parent = repository.resolve(revision) or ""
        if by_kind["header"][0].get("parentCommit", parent) != parent:
            return self.answer({"error": "A commit has happened since. Please refresh and try again."}, 412)
        self.server.commits.append(files)
        before = {path: content for path, content in repository.commits[parent].items() if path not in deleted}
        oid = hashlib.sha1(f"{name} {len(repository.commits)}".encode()).hexdigest()
        repository.commits[oid] = {**before, **files}
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}
        if "create_pr=1" in urlsplit(self.path).query:
            revision = f"refs/pr/{len(repository.branches)}"
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{len(repository.branches)}"
        repository.branches[revision] = oid
        folder = self.server.folder / name.rpartition("/")[2]
        for path in deleted if revision == "main" else ():
            (folder / path).unlink()
        for path, content in files.items() if revision == "main" else ():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return self.answer(answer)

    def branch(self, name: str, branch: str) -> None:
        self.body()
        branches = self.server.repositories[name].branches
        known = branch in branches
        branches.setdefault(branch, branches["main"])
        self.answer({}, 409 if known else 200)

    def refs(self, name: str) -> None:
        repository = self.server.repositories[name]
        kinds = {"branches": repository.branches, "tags": repository.tags, "converts": {}}
        self.answer(
            {
                kind: [{"name": name, "ref": name, "targetCommit": oid} for name, oid in found.items()]
                for kind, found in kinds.items()
            }
        )

    def tag(self, name: str, revision: str) -> None:
        repository = self.server.repositories[name]
        repository.tags[json.loads(self.body())["tag"]] = repository.resolve(revision) or ""
        self.answer({})


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
