# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Who imports whom, seen from running processes and by import-linter."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.house.rules import PACKAGE, ROOT

_PRINT = "; import sys, json; print(json.dumps([*sys.modules]))"


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after `code`, but for those of a bare one."""
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", code + _PRINT],
        capture_output=True, text=True, env=environment, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    """Third-party top-level packages among `modules`."""
    names = {module.partition(".")[0] for module in modules}
    return {
        name
        for name in names - set(sys.stdlib_module_names) - {"llmserve", "__main__", "site"}
        if not name.startswith(("_", "sitecustomize", "distutils", "__"))
    }


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["nonsense"]])
def test_main_help_imports_argparse_and_config_alone(argv: list[str]) -> None:
    loaded = modules_after(
        "import contextlib, io\n"
        "from llmserve.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    main({argv})\n"
        "pass"
    )
    assert "argparse" in loaded
    assert packages(loaded) == set()
    own = {m.split(".")[1] for m in loaded if m.startswith("llmserve.")}
    assert own <= {"cli", "config", "errors", "envs", "utils"}
    assert "asyncio" not in loaded


HEAVY = {"torch", "transformers", "xgrammar", "triton"}
API_MODULES = ["api/app.py", "api/server.py", "frontend/async_llm.py", "engine/client.py"]


@pytest.mark.parametrize("path", API_MODULES)
def test_api_process_is_free_of_torch(path: str) -> None:
    assert (PACKAGE / path).exists()
    module = "llmserve." + path.removesuffix(".py").replace("/", ".")
    assert packages(modules_after(f"import {module}")) & HEAVY == set()


def test_scheduler_and_config_import_neither_torch_nor_http() -> None:
    folders = ("config", "core", "kv_cache", "metrics", "parsers", "scheduler", "utils")
    modules = [
        "llmserve." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for folder in folders
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if path.stem != "__init__"
    ]
    loaded = packages(modules_after("; ".join(f"import {module}" for module in modules)))
    assert loaded & (HEAVY | {"fastapi", "pydantic", "starlette"}) == set()


def test_lint_imports_keeps_ten_contracts() -> None:
    run = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": "src", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Contracts: 10 kept, 0 broken." in run.stdout


def test_contracts_name_every_folder() -> None:
    """A new folder falls under the layers contract by itself; here under the other lists too."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = {c["id"]: c for c in config["tool"]["importlinter"]["contracts"]}
    folders = {f"llmserve.{p.parent.name}" for p in PACKAGE.glob("*/__init__.py")}
    http = set(contracts["http-stays-in-api"]["source_modules"])
    assert folders - http == {"llmserve.api", "llmserve.cli"}
    kernels = set(contracts["kernel-packages"]["source_modules"])
    allowed = {"attention", "quantization", "sampling", "distributed", "kernels"}
    assert folders - kernels == {f"llmserve.{name}" for name in allowed}
