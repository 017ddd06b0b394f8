# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import ast
from typing import assert_type

import llmserve
from llmserve.core.outputs import CompletionOutput
from llmserve.frontend.llm import LLM
from tests.house.rules import package_sources


def test_type_checkers_see_what_a_program_gets() -> None:
    """They read the imports that no program runs."""
    (source,) = (source for source in package_sources() if source.path == "__init__.py")
    seen = {
        alias.name: f"{node.module}:{alias.name}"
        for block in source.tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == llmserve._LAZY
    assert sorted(llmserve.__all__) == sorted([*seen, "__version__"])
    # Judged by mypy
    assert_type(llmserve.LLM, type[LLM])
    assert_type(llmserve.CompletionOutput, type[CompletionOutput])
