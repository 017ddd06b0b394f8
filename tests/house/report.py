# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`make house`: numbers to judge by; never a reason to cut in two what is one thing."""

import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterator

from tests.house.rules import Source, package_sources

FILE_LINES, FUNCTION_LINES, KERNEL_LINES, MEMBERS, PARAMETERS = 500, 80, 150, 25, 10
COMMENT_SHARE = (0.03, 0.06)
BUDGETS = {
    "cli": 900, "api": 5000, "frontend": 2000, "engine": 1800, "scheduler": 1500,
    "kv_cache": 1200, "executor": 1000, "worker": 2500, "spec_decode": 1800,
    "structured_output": 800, "sampling": 1500, "model_loader": 1100, "lora": 900,
    "multimodal": 2000, "layers": 2500, "kv_transfer": 1500, "distributed": 2000,
    "metrics": 600, "config": 1200, "core": 1000, "utils": 600,
}  # fmt: skip


def long_functions(source: Source) -> Iterator[str]:
    """Functions over their length or with too many parameters."""
    limit = KERNEL_LINES if source.path.startswith("kernels/") else FUNCTION_LINES
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            count = len(node.args.args) + len(node.args.kwonlyargs)
            if length > limit:
                yield f"{source.path}:{node.lineno} {node.name} {length} lines (about {limit})"
            if count > PARAMETERS:
                yield f"{source.path}:{node.lineno} {node.name} {count} parameters"


def big_classes(source: Source) -> Iterator[str]:
    """Classes with many methods or attributes."""
    for node in source.nodes:
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) for n in node.body)
            attributes = {
                n.attr
                for n in ast.walk(node)
                if isinstance(n, ast.Attribute)
                and isinstance(n.ctx, ast.Store)
                and isinstance(n.value, ast.Name)
                and n.value.id == "self"
            }
            for what, count in (("methods", methods), ("attributes", len(attributes))):
                if count > MEMBERS:
                    yield f"{source.path}:{node.lineno} {node.name} {count} {what}"


def probes(source: Source) -> Iterator[str]:
    """`hasattr`, and `getattr` with a default: for foreign configs only."""
    for node in source.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if name == "hasattr" or (name == "getattr" and len(node.args) == 3):
                yield f"{source.path}:{node.lineno} {name}"


def comment_lines(source: Source) -> int:
    """Lines that hold a comment, the licence left out."""
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    return sum(t.type == tokenize.COMMENT and "SPDX" not in t.string for t in tokens)


def main() -> None:
    """Prints the report."""
    lines: dict[str, int] = defaultdict(int)
    comments = 0
    for source in package_sources():
        lines[source.path.partition("/")[0]] += len(source.lines)
        comments += comment_lines(source)
        if len(source.lines) > FILE_LINES:
            print(f"{source.path} {len(source.lines)} lines (about {FILE_LINES})")
        for check in (long_functions, big_classes, probes):
            for finding in check(source):
                print(finding)
    total = sum(lines.values())
    print()
    for folder, count in sorted(lines.items()):
        budget = BUDGETS.get(folder)
        print(f"{folder:20} {count:6} lines" + (f" of {budget}" if budget else ""))
    share = comments / total
    low, high = COMMENT_SHARE
    remark = "" if low <= share <= high else f" (usual: {low:.0%} to {high:.0%})"
    print(f"{'all':20} {total:6} lines, {share:.1%} with comments{remark}")


if __name__ == "__main__":
    main()
