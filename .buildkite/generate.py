# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Writes pipeline.yml from the layer contract in pyproject.toml; `--check` only compares.

Lint, house and CPU tests come first. Then one GPU step for each folder whose tests have a `gpu`
marker; it runs when that folder, a folder below it or its tests change.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / ".buildkite" / "pipeline.yml"
HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
# Written by .buildkite/generate.py from the layer contract in pyproject.toml.
steps:
  - label: lint and house
    key: lint
    command: make lint house
    agents: {queue: cpu}
  - label: tests without a GPU
    key: cpu
    command: .ci/run
    agents: {queue: cpu}
  - wait
"""
MARKER = re.compile(r"mark\.(multi_)?gpu\b")


def layers() -> list[list[str]]:
    """The folders of each layer, top first."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = (c for c in config["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    return [re.findall(r"\w+", line) for line in contract["layers"]]


def step(folder: str, below: list[str], several: bool) -> str:
    """One folder's GPU step; `below` are the folders it may import from."""
    paths = [f"tests/{folder}/", *(f"src/llmserve/{name}" for name in (folder, *below)), "csrc/"]
    if folder in ("e2e", "parity"):
        paths = [f"tests/{folder}/", "src/", "csrc/"]
    dependencies = "".join(f"      - {path}\n" for path in (*paths, "pyproject.toml"))
    return (
        f"  - label: {folder} on {'several GPUs' if several else 'a GPU'}\n"
        f"    key: {'multi-' if several else ''}gpu-{folder.replace('_', '-')}\n"
        f"    depends_on: [lint, cpu]\n"
        f"    command: make test-gpu ARGS='-m {'multi_gpu' if several else 'gpu'} tests/{folder}'\n"
        f"    agents: {{queue: {'multi-gpu' if several else 'gpu'}}}\n"
        f"    source_file_dependencies:\n{dependencies}"
    )


def pipeline() -> str:
    """The whole file."""
    order = layers()
    places = [(name, sum(order[i + 1 :], [])) for i, names in enumerate(order) for name in names]
    text = HEAD
    for folder, below in [*places, ("e2e", []), ("parity", [])]:
        marks = [
            match.group(1)
            for path in sorted((ROOT / "tests" / folder).rglob("test_*.py"))
            for match in MARKER.finditer(path.read_text())
        ]
        text += "".join(
            step(folder, below, several)
            for several in (False, True)
            if any((mark is not None) == several for mark in marks)
        )
    return text


def main() -> int:
    """Exit code 1 where the file on disk differs and `--check` was given."""
    if sys.argv[1:] == ["--check"]:
        return int(TARGET.read_text() != pipeline())
    TARGET.write_text(pipeline())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
