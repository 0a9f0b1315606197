"""A small Hub on loopback, in memory: what huggingface_hub (0.36 and 2.x) asks of it to create, push, load and download model
repositories, with tokens, private and gated repositories, branches and pinned commits.

    with Hub() as hub:
        hub.add_token("hf_writer", "me")
        subprocess.run([...], env={**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1"})
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Optional
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SIZE = 100_000  # bytes from which a file goes the way of large files


@dataclass
class Blob:
    data: bytes
    lfs: bool = False

    @property
    def etag(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repository:
    owner: str
    private: bool = False
    gated: bool = False
    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)  # commit -> {path: Blob}

    def commit(self, branch: str, files: dict) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> Optional[str]:
        revision = self.branches.get(revision, revision)
        return revision if revision in self.commits else None


class Hub:
    """
    The server.

    Attributes:
        url: the endpoint.
        repositories: `Repository` by id; may be changed while the server runs.
        moved: old id -> new id, answered by a redirect.
        broken: path pattern (regex) of requests that are cut off in the middle, to play a lost connection.
        requests: the method and path of every request so far.
    """

    def __init__(self):
        self.repositories, self.moved, self.tokens, self.objects, self.requests = {}, {}, {}, {}, []
        self.broken = None
        hub = self

        class BoundHandler(Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def add_token(self, token: str, user: str, write: bool = True) -> None:
        self.tokens[token] = (user, write)

    def add_repository(self, name: str, files: dict, **kwargs) -> str:
        """A repository with the given files (path -> bytes). Returns its commit."""
        repository = self.repositories.setdefault(name, Repository(name.partition("/")[0], **kwargs))
        return repository.commit("main", {path: Blob(data, len(data) >= LFS_SIZE) for path, data in files.items()})


class Problem(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message or code


ROUTES = []


def route(method: str, pattern: str):
    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: Hub

    def log_message(self, *args):
        pass

    def handle_request(self):
        hub, url = self.server_hub, urlsplit(self.path)
        path = unquote(url.path)
        hub.requests.append((self.command, path))
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.broken and re.search(hub.broken, f"{self.command} {path}"):
            self.close_connection = True
            self.connection.close()
            return
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if match and self.command in (method, "HEAD" if method == "GET" else method):
                try:
                    return function(self, **match.groupdict())
                except Problem as problem:
                    headers = {"X-Error-Code": problem.code, "X-Error-Message": problem.message}
                    return self.answer({"error": problem.message}, problem.status, headers)
        self.answer({"error": f"no route for {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def answer(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Type" not in (headers or {}):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # -- who may do what ---------------------------------------------------------------------------------------------

    def user(self) -> tuple:
        """Name and write permission of the token; `(None, False)` without one."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.server_hub.tokens.get(token, (None, False))

    def repository(self, name: str, write=False, content=False) -> Repository:
        hub, (user, may_write) = self.server_hub, self.user()
        repository = hub.repositories.get(name)
        if repository is None or repository.private and user != repository.owner:
            raise Problem(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (may_write and user == repository.owner):
            raise Problem(403 if user else 401, "", "You don't have the rights to write to this repository")
        if content and repository.gated and user != repository.owner:
            raise Problem(403 if user else 401, "GatedRepo", f"Access to model {name} is restricted")
        return repository

    def files(self, repository: Repository, revision: str) -> tuple:
        commit = repository.resolve(revision)
        if commit is None:
            raise Problem(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    # -- reading -----------------------------------------------------------------------------------------------------

    @route("GET", r"/api/whoami-v2")
    def whoami(self):
        user, may_write = self.user()
        if user is None:
            raise Problem(401, "", "Invalid user token")
        role = "write" if may_write else "read"
        self.answer(
            {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role, "displayName": "t"}}}
        )

    @route("GET", rf"/api/models/{REPO}(?:/revision/(?P<revision>.+))?")
    def info(self, repo, revision):
        if repo in self.server_hub.moved:
            suffix = f"/revision/{revision}" if revision else ""
            return self.redirect(f"/api/models/{self.server_hub.moved[repo]}{suffix}")
        repository = self.repository(repo)
        commit, files = self.files(repository, revision or "main")
        siblings = [{"rfilename": path, "size": len(blob.data), "blobId": blob.etag} for path, blob in files.items()]
        content = {"_id": repo, "id": repo, "modelId": repo, "sha": commit, "private": repository.private}
        self.answer({**content, "tags": [], "gated": "manual" if repository.gated else False, "siblings": siblings})

    @route("GET", rf"/api/models/{REPO}/refs")
    def refs(self, repo):
        branches = self.repository(repo).branches
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches.items()]
        self.answer({"branches": listed, "converts": [], "tags": []})

    @route("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, repo, revision, folder):
        if repo in self.server_hub.moved:
            return self.redirect(f"/api/models/{self.server_hub.moved[repo]}/tree/{revision}?recursive=true")
        _, files = self.files(self.repository(repo, content=True), revision)
        if folder is not None:  # repositories are flat here
            raise Problem(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        self.answer([self.entry(path, blob) for path, blob in files.items()])

    @route("POST", rf"/api/models/{REPO}/paths-info/(?P<revision>.+)")
    def paths_info(self, repo, revision):
        _, files = self.files(self.repository(repo, content=True), revision)
        asked = parse_qs(self.body.decode()).get("paths") or json.loads(self.body or b"{}").get("paths", [])
        self.answer([self.entry(path, files[path]) for path in asked if path in files])

    def entry(self, path: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.etag}
        return {**entry, "lfs": {"oid": blob.etag, "size": len(blob.data), "pointerSize": 130}} if blob.lfs else entry

    @route("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo, revision, path):
        if repo in self.server_hub.moved:
            return self.redirect(f"/{self.server_hub.moved[repo]}/resolve/{revision}/{path}")
        commit, files = self.files(self.repository(repo, content=True), revision)
        if path not in files:
            raise Problem(404, "EntryNotFound", f"Entry not found: {path}")
        blob = files[path]
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        self.answer(blob.data, headers=headers)

    def redirect(self, path: str):
        self.answer({}, 307, {"Location": path})

    # -- writing -----------------------------------------------------------------------------------------------------

    @route("POST", r"/api/repos/create")
    def create(self):
        user, may_write = self.user()
        values = json.loads(self.body)
        owner = values.get("organization") or user
        name = values["name"] if "/" in values["name"] else f"{owner}/{values['name']}"
        if user is None:
            raise Problem(401, "", "Invalid user token")
        if not may_write or name.partition("/")[0] != user:
            raise Problem(
                403, "", f"You don't have the rights to create a model under the namespace {name.partition('/')[0]!r}"
            )
        exists = name in self.server_hub.repositories
        if not exists:
            private = values.get("private") or values.get("visibility") == "private"
            repository = self.server_hub.repositories[name] = Repository(user, private=bool(private))
            repository.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})
        content = {"url": f"{self.server_hub.url}/{name}", "name": name, "id": name}
        self.answer(
            {**content, "error": "You already created this model repo"} if exists else content, 409 if exists else 200
        )

    @route("POST", r"/api/validate-yaml")
    def validate(self):
        self.answer({"errors": [], "warnings": []})

    @route("POST", rf"/api/models/{REPO}/branch/(?P<branch>.+)")
    def branch(self, repo, branch):
        repository = self.repository(repo, write=True)
        if branch in repository.branches:
            raise Problem(409, "", "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repository.branches[branch], _ = self.files(repository, start)
        self.answer({})

    @route("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)")
    def preupload(self, repo, revision):
        _, files = self.files(self.repository(repo, write=True), revision)
        asked = json.loads(self.body)["files"]
        self.answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["size"] >= LFS_SIZE else "regular",
                        "shouldIgnore": False,
                        "oid": files[file["path"]].etag if file["path"] in files else None,
                    }
                    for file in asked
                ]
            }
        )

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo):
        self.repository(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.server_hub.objects:
                upload = {"href": f"{self.server_hub.url}/lfs/{wanted['oid']}", "header": {}}
                entry["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.server_hub.url}/lfs-verify", "header": {}},
                }
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    @route("PUT", r"/lfs/(?P<oid>\w+)")
    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Problem(400, "", "the object is not what its oid says")
        self.server_hub.objects[oid] = self.body
        self.answer({})

    @route("POST", r"/lfs-verify")
    def lfs_verify(self):
        wanted = json.loads(self.body)
        if len(self.server_hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Problem(404, "", "no such object")
        self.answer({})

    @route("POST", rf"/api/models/{REPO}/commit/(?P<branch>.+)")
    def commit(self, repo, branch):
        repository = self.repository(repo, write=True)
        _, old = self.files(repository, branch)
        files = dict(old)
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server_hub.objects:
                    raise Problem(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(self.server_hub.objects[value["oid"]], lfs=True)
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = repository.commit(branch, files)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server_hub.url}/{repo}/commit/{oid}"})
