# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The rules hold for every file, and each turns red on a planted violation."""

from pathlib import Path

import pytest

from tests.house import rules
from tests.house.rules import ROOT, Rule, Source

HOUSE = Path(__file__).parent
HEADER = "".join(f"# {line}\n" for line in rules.SPDX)


@pytest.mark.parametrize("rule", rules.SOURCE_RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule: Rule) -> None:
    assert rules.broken(rule, rules.package_sources()) == []


@pytest.mark.parametrize("rule", rules.TEST_RULES, ids=lambda rule: rule.__name__)
def test_tests_keep(rule: Rule) -> None:
    assert rules.broken(rule, rules.other_sources()) == []


def test_csrc_has_spdx() -> None:
    kinds = (".cu", ".cuh", ".h", ".cpp")
    for path in (path for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds):
        assert path.read_text().splitlines()[:2] == [f"// {line}" for line in rules.SPDX], path


PLANTED = [
    (rules.environment, "import os\nx = os.environ['A']"),
    (rules.environment, "import os\nx = os.getenv('A')"),
    (rules.environment, "from os import environ"),
    (rules.no_global, "def f() -> None:\n    global x\n    x = 1"),
    (rules.no_mixin, "class LoRAMixin: ..."),
    (rules.no_mixin, "class Runner(base.LoRAModelRunnerMixin): ..."),
    (rules.imports_at_top, "def f() -> None:\n    from llmserve.core import request"),
    (rules.imports_at_top, "def f() -> None:\n    import llmserve.core"),
    (rules.imports_at_top, "async def f() -> None:\n    if x:\n        from . import y"),
    (rules.imports_at_top, "import importlib\nimportlib.import_module('a')"),
    (rules.broad_except, "try: ...\nexcept Exception: ..."),
    (rules.broad_except, "try: ...\nexcept (ValueError, BaseException) as e: ..."),
    (rules.broad_except, "try: ...\nexcept: ..."),
    (rules.annotated, "def f(x) -> None: ..."),
    (rules.annotated, "def f(*x: int, **y) -> None: ..."),
    (rules.annotated, "class A:\n    def f(self): ..."),
    (rules.no_code_from_data, "import pickle"),
    (rules.no_code_from_data, "from pickle import loads"),
    (rules.no_code_from_data, "eval('1')"),
    (rules.no_code_from_data, "exec('1')"),
    (rules.no_code_from_data, "torch.load('x.bin')"),
    (rules.no_code_from_data, "AutoModel.from_pretrained('x', trust_remote_code=True)"),
]


@pytest.mark.parametrize(("rule", "text"), PLANTED)
def test_planted_violation_is_found(rule: Rule, text: str) -> None:
    assert list(rule(Source("worker/worker.py", text)))


def test_missing_header_is_found() -> None:
    assert list(rules.spdx(Source("a.py", "x = 1")))
    assert not list(rules.spdx(Source("a.py", HEADER + "x = 1")))


ALLOWED = [
    (rules.environment, "envs.py", "import os\nx = os.environ['A']"),
    (rules.imports_at_top, "utils/registry.py", "importlib.import_module('a')"),
    (rules.imports_at_top, "a.py", "def f() -> None:\n    import torch"),
    (rules.broad_except, "a.py", "try: ...\nexcept Exception: ...  # boundary: one request"),
    (rules.broad_except, "a.py", "try: ...\nexcept ValueError: ..."),
    (rules.annotated, "a.py", "class A:\n    def f(self, x: int, *, y: int) -> None: ..."),
    (rules.annotated, "a.py", "@triton.jit\ndef kernel(x, N: tl.constexpr): ..."),
    (rules.no_code_from_data, "a.py", "model.eval()"),
    (rules.no_code_from_data, "a.py", "f(trust_remote_code=False)"),
]


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_what_is_allowed_passes(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(Source(path, text)))


def test_flags_equal_their_list() -> None:
    """A new flag is one config field and one line in flags.txt, seen in review."""
    flags = [
        flag
        for source in rules.package_sources()
        if source.path.startswith("config/")
        for flag in rules.config_flags(source)
    ]
    assert flags
    assert sorted(flags) == sorted(rules.read_list(HOUSE / "flags.txt"))


def test_environment_names_equal_their_list() -> None:
    """At most 12 variables; what a user sets is a flag."""
    (envs,) = (source for source in rules.package_sources() if source.path == "envs.py")
    names = rules.environment_names(envs)
    assert names == set(rules.read_list(HOUSE / "envs.txt"))
    assert len([name for name in names if name.startswith("LLMSERVE_")]) <= 12


def test_lists_are_read_from_code() -> None:
    text = "@dataclass\nclass A:\n    x: int = flag(1, 'h')\n    y: int = 2"
    assert rules.config_flags(Source("config/a.py", text)) == ["A.x"]
    text = "import os\na = os.environ.get('A', '')\nb = os.environ['B']"
    assert rules.environment_names(Source("envs.py", text)) == {"A", "B"}


def test_every_registry_entry_exists_and_has_a_test() -> None:
    wrong = []
    by_path = {source.path: source for source in rules.package_sources()}
    for source in by_path.values():
        for line, entry in rules.registry_entries(source):
            module, _, name = entry.partition(":")
            target = by_path.get(rules.module_path(module))
            if target is None or name not in rules.top_level_names(target):
                wrong.append(f"{source.path}:{line} {entry} does not exist")
            elif not rules.test_files(target.path, ROOT / "tests") and target.path not in UNTESTED:
                wrong.append(f"{source.path}:{line} {entry} has no test file")
    assert wrong == []


def test_registry_entries_are_found_in_code() -> None:
    text = 'R = Registry("x", {"a": "llmserve.models.llama:Llama"})'
    assert rules.registry_entries(Source("models/registry.py", text)) == [
        (1, "llmserve.models.llama:Llama")
    ]


UNTESTED = rules.read_list(HOUSE / "untested.txt")


def test_tests_mirror_the_sources() -> None:
    """A source file has tests/X/test_Y.py; the few that are tested elsewhere are listed."""
    assert sorted(rules.without_tests(rules.package_sources(), ROOT / "tests")) == sorted(UNTESTED)
    assert rules.orphan_tests(ROOT / "tests", rules.PACKAGE) == []


def test_mirror_rule_sees_a_missing_and_an_orphan_test(tmp_path: Path) -> None:
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "test_nothing.py").touch()
    source = Source("worker/worker.py", "class Worker: ...")
    assert rules.without_tests((source,), tmp_path) == ["worker/worker.py"]
    assert rules.orphan_tests(tmp_path, rules.PACKAGE) == ["worker/test_nothing.py"]


def test_skips_name_their_test_and_reason() -> None:
    for line in rules.read_list(HOUSE / "skips.txt"):
        nodeid, _, reason = line.partition(" ")
        assert (ROOT / nodeid.partition("::")[0]).exists() and reason.strip(), line
