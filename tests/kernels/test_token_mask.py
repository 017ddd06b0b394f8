# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""mask_logits bit by bit, in torch and in interpreted Triton; compiled for both targets."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from llmserve import envs
from llmserve.kernels import token_mask as module
from llmserve.kernels.token_mask import mask_logits, mask_logits_torch
from tests.helpers.compile_kernel import ARCHITECTURES, compile_for
from tests.helpers.paged import run_interpreted

torch.set_num_threads(1)


@pytest.mark.parametrize("function", [mask_logits, mask_logits_torch])
@pytest.mark.parametrize(("n", "width"), [(1, 31), (1, 32), (3, 4097), (5, 9000)])
def test_equals_bit_by_bit(n: int, width: int, function: Any) -> None:
    rng = np.random.default_rng()
    words = rng.integers(-(2**31), 2**31, (n, -(-width // 32)), dtype=np.int32)
    words[0, 0] = -1
    words[-1, -1] = 0
    logits = torch.randn(n, width + 3)[:, :width] if width == 9000 else torch.randn(n, width)
    wanted = logits.clone()
    for row in range(n):
        for token in range(width):
            if not int(words[row, token // 32]) >> token % 32 & 1:
                wanted[row, token] = -math.inf
    function(logits, torch.from_numpy(words))
    assert torch.equal(logits, wanted)


def test_no_rows() -> None:
    mask_logits(torch.empty(0, 40), torch.empty(0, 2, dtype=torch.int32))


if not envs.TRITON_INTERPRET:

    def test_interpreted() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_compiles(arch: int) -> None:
        types = {"logits": "*fp32", "words": "*i32", "num_words": "i32", "width": "i32"}
        compile_for(arch, module._mask_kernel, types, BLOCK=4096)
