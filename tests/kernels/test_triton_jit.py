# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Kernels import without Triton, and the torch references run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmserve.kernels import triton_jit
from llmserve.kernels.triton_jit import next_power_of_2, use_triton

_WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
from llmserve.attention.triton_paged import TritonPagedAttention
from llmserve.kernels.rms_norm import rms_norm
print(rms_norm(torch.ones(2, 4), torch.full((4,), 3.0), 0.0).tolist())
"""


def test_without_triton() -> None:
    env = os.environ | {"PYTHONPATH": "src", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", _WITHOUT]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str([[3.0] * 4] * 2), done.stderr


def test_a_cpu_tensor_stays_with_torch() -> None:
    assert not use_triton(torch.ones(1))


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_2(n: int, power: int) -> None:
    assert next_power_of_2(n) == power


def test_no_kernel_has_an_argument_that_the_launcher_shadows() -> None:
    """Triton 3.6 assigns these names in the function it generates, before it reads the arguments:
    a kernel that uses one runs in the interpreter and fails at its first launch on a GPU.
    """
    taken = {"params", "specialization", "options", "backend"}
    folder = Path(triton_jit.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
            ):
                names = {argument.arg for argument in node.args.args}
                assert not names & taken, f"{path.name}: {node.name}"
