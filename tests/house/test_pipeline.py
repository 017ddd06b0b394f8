# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What stands in the files at the top of the repository agrees with the rest of it."""

import re
import subprocess
import sys

import yaml

from tests.house.rules import ROOT

GENERATE = [sys.executable, str(ROOT / ".buildkite" / "generate.py"), "--check"]


def test_pipeline_is_what_the_layers_say() -> None:
    assert subprocess.run(GENERATE).returncode == 0, "run .buildkite/generate.py"


def test_steps_depend_on_their_folder_and_the_layers_below() -> None:
    steps = yaml.safe_load((ROOT / ".buildkite" / "pipeline.yml").read_text())["steps"]
    assert [step.get("key") for step in steps[:2]] == ["lint", "cpu"] and steps[2] == "wait"
    for step in steps[3:]:
        assert step["source_file_dependencies"] and step["depends_on"] == ["lint", "cpu"]


def test_hooks_run_offline() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repo,) = config["repos"]
    assert repo["repo"] == "local"
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}
    names = {hook["id"] for hook in repo["hooks"]}
    assert names >= {
        "ruff-format", "ruff-check", "mypy", "lint-imports", "house", "clang-format", "typos"
    }  # fmt: skip


def test_claude_md_is_short_and_names_real_tests() -> None:
    text = (ROOT / "CLAUDE.md").read_text()
    assert len(text.splitlines()) <= 120
    house = "".join(path.read_text() for path in (ROOT / "tests" / "house").glob("test_*.py"))
    named = set(re.findall(r"\btest_[a-z_]{9,}\b(?!\.py)", text))
    assert named and all(f"def {name}(" in house for name in named)
