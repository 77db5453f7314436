"""A container of a manifest as the kubelet would start it, as far as one machine without images can.

The root of this machine stands for the image: read-only, with the volumes of the manifest mounted into
it, run as the manifest's user, without capabilities and without a way to gain any.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.manifests.documents import Documents, look, mapping, named, sequence
from infra.manifests.pods import Pod, environment
from tests.conftest import REPOSITORY

CODE, VENV = "/opt/code", "/opt/venv"
_OWN = {CODE: REPOSITORY, VENV: Path(sys.prefix)}
_SCRIPT = r"""
import base64, fcntl, json, os, socket, struct, subprocess, sys
told = json.loads(sys.argv[1])
def call(*words): subprocess.run(words, check=True)
call("mount", "--make-rprivate", "/")
call("mount", "-t", "tmpfs", "tmpfs", told["scratch"])
up, work, root = (os.path.join(told["scratch"], name) for name in ("up", "work", "root"))
for one in (up, work, root): os.mkdir(one)
call("mount", "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={up},workdir={work}", root)
for path in (*told["image"], *(mount["path"] for mount in told["mounts"])):
    os.makedirs(root + path, exist_ok=True)
for path in told["passable"]: os.chmod(root + path, os.stat(root + path).st_mode | 0o011)
os.makedirs(root + told["folder"], exist_ok=True)
call("mount", "-o", "remount,ro", root)
for name in ("/dev", "/sys"): call("mount", "--rbind", name, root + name)
if told["alone"]:
    call("mount", "-t", "proc", "proc", root + "/proc")
    up = struct.pack("16sh14x", b"lo", 1)
    fcntl.ioctl(socket.socket(), 0x8914, up)  # SIOCSIFFLAGS: its loopback, and no other way out
else:
    call("mount", "--rbind", "/proc", root + "/proc")
for path, here in told["image"].items():
    call("mount", "--bind", here, root + path)
    call("mount", "-o", "remount,bind,ro", root + path)
for mount in sorted(told["mounts"], key=lambda one: one["path"]):
    path = root + mount["path"]
    if not os.path.isdir(path): os.makedirs(path)
    call("mount", "-t", "tmpfs", "-o", f"mode=2775,gid={told['group']}", "tmpfs", path)
    for name, content in mount["files"].items():
        with open(os.path.join(path, name), "wb") as file: file.write(base64.b64decode(content))
        os.chown(os.path.join(path, name), 0, told["group"])
        os.chmod(os.path.join(path, name), 0o440)
    if mount["read_only"]: call("mount", "-o", "remount,ro", path)
os.chroot(root)
os.chdir(told["folder"])
user, group = told["user"], told["group"]
os.execvpe("setpriv", ["setpriv", f"--reuid={user}", f"--regid={group}", f"--groups={group}",
    "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--", *told["command"]],
    told["environment"])
"""


def why_not() -> str | None:
    """What this machine lacks; None if nothing."""
    if os.geteuid() != 0:
        return "needs root, to make a root of its own"
    if lost := [name for name in ("unshare", "setpriv", "kubectl") if shutil.which(name) is None]:
        return f"needs {', '.join(lost)}"
    done = subprocess.run(
        ["unshare", "--mount", "mount", "--make-rprivate", "/"], capture_output=True, check=False
    )
    return None if done.returncode == 0 else "may not mount here"


def command(
    documents: Documents,
    pod: Pod,
    *,
    scratch: Path,
    instead: Mapping[str, str] | None = None,
    words: Sequence[str] | None = None,
    secrets: Mapping[str, Mapping[str, str]] | None = None,
    image: Mapping[str, Path] | None = None,
    folder: str = "/tmp",
    alone: bool = False,
) -> list[str]:
    """What to run for the first container.

    Args:
        instead: words of its command, and what stands for them here
        words: another command, in the same container
        secrets: by their names, files by theirs
        image: folders of this machine that the image has, by their paths in it
        folder: the image's working folder
        alone: with processes and a network of its own, which end with it
    """
    container = pod.containers[0].value
    seen = environment(container, documents, pod.namespace)
    own = [*sequence(container.get("command")), *sequence(container.get("args"))]
    own = [(instead or {}).get(word, word) for word in own]
    told = {
        "alone": alone,
        "scratch": str(scratch),
        "mounts": [
            _mount(documents, pod, mapping(one), secrets or {})
            for one in sequence(container.get("volumeMounts"))
        ],
        "image": {k: str(v) for k, v in {**_OWN, **(image or {})}.items()},
        # As root's home, where Python may be: only in the copy that the container sees.
        "passable": [str(path) for path in Path(sys.base_prefix).parents],
        "folder": str(container.get("workingDir") or folder),
        "user": look(pod.spec, "securityContext.runAsUser"),
        "group": look(pod.spec, "securityContext.fsGroup"),
        "command": list(words or own),
        "environment": {
            "PATH": f"{VENV}/bin:/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": CODE,
            "PYTHONDONTWRITEBYTECODE": "1",
            **seen,
        },
    }
    more = ["--net", "--pid", "--fork", "--kill-child"] if alone else []
    return ["unshare", "--mount", *more, sys.executable, "-c", _SCRIPT, json.dumps(told)]


def _mount(
    documents: Documents,
    pod: Pod,
    mount: Mapping[str, Any],
    secrets: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    volumes = {one["name"]: mapping(one) for one in pod.spec["volumes"]}
    volume = volumes[mount["name"]]
    files: Mapping[str, str] = {}
    if name := look(volume, "configMap.name"):
        files = mapping(look(named(documents, "ConfigMap", name), "data"))
    if name := look(volume, "secret.secretName"):
        files = secrets[name]
    return {
        "path": mount["mountPath"],
        "read_only": bool(mount.get("readOnly")),
        "files": {k: base64.b64encode(v.encode()).decode() for k, v in files.items()},
    }
