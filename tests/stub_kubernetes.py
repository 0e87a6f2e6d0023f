"""The part of a Kubernetes API server that Snakemake's plugin calls; a pod is a process in a folder of its own.

It refuses what a real server refuses: a GPU without a limit, and the log of an earlier container where none was.
"""

import base64
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Document = dict[str, Any]


class Pod:
    """A container's command as a process with its own working directory, home and log."""

    def __init__(self, folder: Path, container: Document, environment: Mapping[str, str]) -> None:
        (folder / "home").mkdir(parents=True)
        (folder / "workdir").mkdir()
        self.log = folder / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*container["command"], *container["args"]],
                cwd=folder / "workdir",
                env={**environment, "HOME": str(folder / "home")},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Cluster(ThreadingHTTPServer):
    """A cluster whose image has the programs of a folder, and whose volumes are folders.

    Attributes:
        jobs: each job that was created, by name, as its document.
        pods: the pod of each job that still exists, by the name of the job.
    """

    def __init__(self, folder: Path, programs: Path, volumes: Mapping[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Calls)
        self.folder, self.volumes = folder, volumes
        self.image = {"PATH": os.pathsep.join([str(programs), "/usr/bin", "/bin"])}
        self.secrets: dict[str, dict[str, str]] = {}
        self.jobs: dict[str, Document] = {}
        self.pods: dict[str, Pod] = {}

    def __enter__(self) -> "Cluster":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for pod in self.pods.values():
            pod.end()
        self.shutdown()
        self.server_close()

    def kubeconfig(self) -> Path:
        """The file that tells a client where the server is."""
        path = self.folder / "kubeconfig"
        address = f"http://127.0.0.1:{self.server_address[1]}"
        context = {"name": "stub", "context": {"cluster": "stub", "user": "stub"}}
        text = {"apiVersion": "v1", "kind": "Config", "current-context": "stub", "contexts": [context]}
        clusters = [{"name": "stub", "cluster": {"server": address}}]
        path.write_text(json.dumps({**text, "clusters": clusters, "users": [{"name": "stub", "user": {}}]}))
        return path

    def create_secret(self, body: Document) -> Document:
        data = {key: base64.b64decode(value).decode() for key, value in body["data"].items()}
        self.secrets[body["metadata"]["name"]] = data
        return body

    def create_job(self, body: Document) -> Document:
        """Start the job's pod, or refuse the job with a reason."""
        name, spec = body["metadata"]["name"], body["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        asked = container["resources"]
        for kind, count in asked["requests"].items():
            if "/" in kind and asked.get("limits", {}).get(kind) != count:
                raise ValueError(f"limits.{kind}: Limit must be set for non overcommitable resources")
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for mount in container["volumeMounts"]:
            claim = volumes[mount["name"]].get("persistentVolumeClaim")
            if claim and self.volumes[claim["claimName"]] != Path(mount["mountPath"]):
                raise ValueError(f"{mount['mountPath']}: the folder of {claim['claimName']} has another place here")
        references = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container["env"]}
        secrets = {name: self.secrets[found["name"]][found["key"]] for name, found in references.items()}
        self.jobs[name] = body
        self.pods[name] = Pod(self.folder / name, container, self.image | secrets)
        return body

    def container(self, name: str) -> Document:
        """What a job's pod runs and asks for."""
        (container,) = self.jobs[name]["spec"]["template"]["spec"]["containers"]
        return dict(container)

    def job(self, name: str) -> Document:
        status = self.pods[name].process.poll()
        counts = {} if status is None else {"succeeded": int(not status), "failed": int(bool(status))}
        return {**self.jobs[name], "status": counts}

    def pod(self, name: str) -> Document:
        status = self.pods[name].process.poll()
        state: Document = {"running": {}} if status is None else {"terminated": {"exitCode": status}}
        container = {"name": "snakemake", "image": "", "imageID": "", "ready": True, "restartCount": 0, "state": state}
        return {"metadata": {"name": name}, "status": {"containerStatuses": [container]}}


class Calls(BaseHTTPRequestHandler):
    """The calls of the API, as the plugin makes them. A pod has the name of its job."""

    server: Cluster

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        match address.path.split("/")[-3:]:
            case ["jobs", name, "status"]:
                self.tell(self.server.job, name)
            case ["pods", name, "log"]:
                if query.get("previous") == ["True"]:  # a pod's container starts once
                    self.send(400, {"message": f'previous terminated container "snakemake" in pod "{name}" not found'})
                else:
                    self.send(200, self.server.pods[name].log.read_text())
            case [*_, "pods"]:
                name = query["labelSelector"][0].removeprefix("job-name=")
                self.send(200, {"items": [self.server.pod(name)] if name in self.server.pods else []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        create = {"secrets": self.server.create_secret, "jobs": self.server.create_job}
        self.tell(create[self.path.split("/")[-1]], body)

    def do_DELETE(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        kind, name = urlsplit(self.path).path.split("/")[-2:]
        if kind == "secrets":
            del self.server.secrets[name]
        if kind == "pods":
            self.server.pods[name].end()
        if kind == "jobs":
            self.server.pods.pop(name).end()
        self.send(200, {"status": "Success"})

    def tell(self, do: Any, about: Any) -> None:
        """Send what a call gives. A wrong request has the status of a real server."""
        try:
            self.send(200, do(about))
        except ValueError as error:
            self.send(422, {"message": str(error)})
        except KeyError as error:
            self.send(404, {"message": f"{error} not found"})

    def send(self, status: int, content: Document | str) -> None:
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        with open(self.server.folder / "calls.log", "a") as log:
            log.write(f"{format % args}\n")
