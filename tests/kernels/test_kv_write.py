# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""write_kv against a loop, in torch and in interpreted Triton; compiled for both targets."""

import pytest
import torch

from llmserve import envs
from llmserve.kernels import kv_write as module
from llmserve.kernels.kv_write import write_kv
from tests.helpers.compile_kernel import ARCHITECTURES, compile_for
from tests.helpers.paged import run_interpreted

torch.set_num_threads(1)


@pytest.mark.parametrize("num_tokens", [1, 2, 19])
@pytest.mark.parametrize(("heads", "block_size", "dim"), [(3, 16, 64), (1, 8, 80)])
def test_equals_loop(num_tokens: int, heads: int, block_size: int, dim: int) -> None:
    qkv = torch.randn(num_tokens, 4 * heads, dim)
    key, value = qkv[:, heads : 2 * heads], qkv[:, 2 * heads : 3 * heads]
    cache = torch.randn(9, 2, heads, block_size, dim)
    expected = cache.clone()
    slots = torch.randperm(9 * block_size)[:num_tokens]
    for token, slot in enumerate(slots.tolist()):
        expected[slot // block_size, 0, :, slot % block_size] = key[token]
        expected[slot // block_size, 1, :, slot % block_size] = value[token]
    write_kv(key, value, cache, slots)
    assert torch.equal(cache, expected)


if not envs.TRITON_INTERPRET:

    def test_interpreted() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_compiles(arch: int) -> None:
        types = {"key": "*bf16", "value": "*bf16", "kv_cache": "*bf16", "slot_mapping": "*i64"}
        types |= {"block_size": "i32", "head_dim": "i32"}
        compile_for(arch, module._write_kv_kernel, types, warps=1, BLOCK=128)
