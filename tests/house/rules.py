# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The rules of the house, as functions from one parsed file to the lines that break them."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "llmserve"
SPDX = (
    "SPDX-License-Identifier: Apache-2.0",
    "SPDX-FileCopyrightText: Copyright contributors to the llmserve project",
)
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_BANNED_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}


@dataclass(frozen=True)
class Source:
    """One Python file. `path` is relative to src/llmserve, or to the root for tests."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.text, self.path)

    @cached_property
    def lines(self) -> list[str]:
        """The file's lines."""
        return self.text.splitlines()

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the tree."""
        return list(ast.walk(self.tree))


Rule = Callable[[Source], Iterator[tuple[int, str]]]


def _own(name: str | None) -> bool:
    return name is not None and (name == "llmserve" or name.startswith("llmserve."))


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def environment(source: Source) -> Iterator[tuple[int, str]]:
    """The environment is read in envs.py alone."""
    if source.path == "envs.py":
        return
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and _dotted(node) in (
            "os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv",
        ):  # fmt: skip
            yield node.lineno, f"{_dotted(node)} outside envs.py"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in ("environ", "environb", "getenv", "putenv", "unsetenv"):
                    yield node.lineno, f"os.{alias.name} outside envs.py"


def no_global(source: Source) -> Iterator[tuple[int, str]]:
    """No `global` statement."""
    for node in source.nodes:
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"


def no_mixin(source: Source) -> Iterator[tuple[int, str]]:
    """No mixin classes."""
    for node in source.nodes:
        if isinstance(node, ast.ClassDef):
            for name in (node.name, *map(_dotted, node.bases)):
                if "mixin" in name.lower():
                    yield node.lineno, f"class {node.name}: {name}"


def imports_at_top(source: Source) -> Iterator[tuple[int, str]]:
    """Own imports stand at the top of a file, but of those that come before the program is ready to
    be interrupted; only utils/registry.py imports by name."""
    if source.path in ("utils/registry.py", "__init__.py", "__main__.py"):
        return
    for function in source.nodes:
        if not isinstance(function, _FUNCTION):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.ImportFrom) and (node.level or _own(node.module)):
                yield node.lineno, f"import of {node.module} in {function.name}()"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if _own(alias.name):
                        yield node.lineno, f"import of {alias.name} in {function.name}()"
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and _dotted(node) == "importlib.import_module":
            yield node.lineno, "importlib.import_module outside utils/registry.py"
        elif isinstance(node, ast.Name) and node.id == "__import__":
            yield node.lineno, "__import__"


def broad_except(source: Source) -> Iterator[tuple[int, str]]:
    """A broad `except` says on its line (or the one above) which `# boundary:` it guards."""
    for node in source.nodes:
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        if all(kind and _dotted(kind) not in ("Exception", "BaseException") for kind in kinds):
            continue
        near = source.lines[max(0, node.lineno - 2) : node.lineno]
        if not any("# boundary:" in line for line in near):
            yield node.lineno, "broad except without `# boundary:`"


def _jit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(node) for node in function.decorator_list)


def annotated(source: Source) -> Iterator[tuple[int, str]]:
    """Every argument and result has a type, but in Triton kernels, which read them otherwise."""
    for node in source.nodes:
        if not isinstance(node, _FUNCTION) or _jit(node):
            continue
        args = [*node.args.posonlyargs, *node.args.args]
        if args and args[0].arg in ("self", "cls"):
            args = args[1:]
        args += [*node.args.kwonlyargs]
        args += [arg for arg in (node.args.vararg, node.args.kwarg) if arg]
        for arg in args:
            if arg.annotation is None:
                yield node.lineno, f"{node.name}({arg.arg}) has no type"
        if node.returns is None:
            yield node.lineno, f"{node.name}() has no result type"


def no_code_from_data(source: Source) -> Iterator[tuple[int, str]]:
    """Nothing that turns data into code."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in _BANNED_MODULES:
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in _BANNED_MODULES:
                yield node.lineno, f"from {node.module} import"
        elif isinstance(node, ast.Call):
            name = _dotted(node.func)
            if name in ("eval", "exec", "torch.load", "torch.hub.load"):
                yield node.lineno, f"{name}()"
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield node.lineno, "trust_remote_code"


def spdx(source: Source) -> Iterator[tuple[int, str]]:
    """The licence stands in the first two lines."""
    for number, wanted in enumerate(SPDX):
        if source.lines[number : number + 1] != [f"# {wanted}"]:
            yield number + 1, f"not `# {wanted}`"


SOURCE_RULES: tuple[Rule, ...] = (
    environment, no_global, no_mixin, imports_at_top, broad_except, annotated, no_code_from_data,
    spdx,
)  # fmt: skip
TEST_RULES: tuple[Rule, ...] = (annotated, spdx)


@lru_cache
def package_sources() -> tuple[Source, ...]:
    """All Python files of the package."""
    return tuple(
        Source(path.relative_to(PACKAGE).as_posix(), path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    )


@lru_cache
def other_sources() -> tuple[Source, ...]:
    """Python files of tests, benchmarks and the pipeline script."""
    return tuple(
        Source(path.relative_to(ROOT).as_posix(), path.read_text())
        for folder in ("tests", "benchmarks", ".buildkite")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.read_text().strip()
    )


def broken(rule: Rule, sources: tuple[Source, ...]) -> list[str]:
    """`file:line what` for everything in `sources` that breaks `rule`."""
    return [f"{s.path}:{line} {what}" for s in sources for line, what in rule(s)]


def read_list(path: Path) -> list[str]:
    """The entries of a list file: one a line, blank lines and `#` lines left out."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def environment_names(source: Source) -> set[str]:
    """The variables that envs.py reads, by their literal names."""
    names: set[str] = set()
    for node in source.nodes:
        if isinstance(node, ast.Call) and _dotted(node.func) in ("os.environ.get", "os.getenv"):
            first = node.args[0]
            names.add(first.value if isinstance(first, ast.Constant) else ast.unparse(first))
        elif isinstance(node, ast.Subscript) and _dotted(node.value) == "os.environ":
            names.add(ast.unparse(node.slice).strip("'\""))
    return names


def config_flags(source: Source) -> list[str]:
    """`Group.field` of each config field made by `flag(...)`."""
    return [
        f"{group.name}.{field.target.id}"
        for group in source.tree.body
        if isinstance(group, ast.ClassDef)
        for field in group.body
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(field.value, ast.Call)
        and _dotted(field.value.func) == "flag"
    ]


def registry_entries(source: Source) -> list[tuple[int, str]]:
    """The `package.module:Name` strings of a file, with their lines."""
    return [
        (node.lineno, node.value)
        for node in source.nodes
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"llmserve(\.\w+)+:\w+", node.value)
    ]


def top_level_names(source: Source) -> set[str]:
    """What a module defines or imports at its top level."""
    names: set[str] = set()
    for node in source.tree.body:
        if isinstance(node, (*_FUNCTION, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def module_path(module: str) -> str:
    """`llmserve.models.llama` -> `models/llama.py` (or its `__init__.py`)."""
    path = "/".join(module.split(".")[1:])
    return f"{path}.py" if (PACKAGE / f"{path}.py").exists() else f"{path}/__init__.py"


def test_files(path: str, tests: Path) -> list[Path]:
    """The tests of a source file: tests/X/test_Y.py, or several tests/X/test_Y_*.py."""
    folder, stem = tests / Path(path).parent, Path(path).stem
    return [
        found
        for found in (folder / f"test_{stem}.py", *sorted(folder.glob(f"test_{stem}_*.py")))
        if found.exists()
    ]


def without_tests(sources: tuple[Source, ...], tests: Path) -> list[str]:
    """Source files that define something and have no test file."""
    return [
        source.path
        for source in sources
        if not source.path.endswith("__init__.py")
        and any(isinstance(node, (*_FUNCTION, ast.ClassDef)) for node in source.tree.body)
        and not test_files(source.path, tests)
    ]


def orphan_tests(tests: Path, package: Path) -> list[str]:
    """Test files outside the free folders that mirror no source file."""
    free = ("house", "e2e", "faults", "parity", "helpers", "clients")
    return [
        path.relative_to(tests).as_posix()
        for path in sorted(tests.rglob("test_*.py"))
        if path.relative_to(tests).parts[0] not in free
        and not _mirrors(path.relative_to(tests), package)
    ]


def _mirrors(test: Path, package: Path) -> bool:
    words = test.stem.removeprefix("test_").split("_")
    return any(
        (package / test.parent / ("_".join(words[:count]) + ".py")).exists()
        or (package / test.parent / "_".join(words[:count]) / "__init__.py").exists()
        for count in range(len(words), 0, -1)
    )
