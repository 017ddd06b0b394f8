# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The fused op, by torch and by Triton, against its parts one by one in float64."""

import pytest
import torch

from llmserve import envs
from llmserve.kernels import cpu
from llmserve.kernels import rope_write as module
from llmserve.kernels.rope_write import rope_write, rope_write_triton, tile_of
from llmserve.kernels.triton_jit import next_power_of_2
from tests.helpers.compile_kernel import ARCHITECTURES, compile_for
from tests.helpers.paged import run_interpreted, untouched

# tokens, heads, kv_heads, head_dim, rot_dim, block_size
CASES = [
    (1, 4, 2, 32, 32, 16), (7, 9, 3, 64, 64, 16), (33, 4, 4, 16, 16, 8), (5, 4, 1, 32, 16, 32),
    (3, 2, 1, 80, 80, 16), (131, 2, 1, 48, 20, 16),
]  # fmt: skip


def _once(key: object, function: object, *args: object) -> object:
    return function(*args)  # type: ignore[operator]


def _expected(
    heads: torch.Tensor,
    kv_heads: int,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> torch.Tensor:
    query, key, value = heads.double().split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    if norms is not None:
        *weights, eps = norms
        query, key = (
            (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w).to(heads.dtype).double()
            for x, w in zip((query, key), weights, strict=True)
        )
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions].double().unsqueeze(1).chunk(2, -1)
    query, key = (
        torch.cat(
            (
                x[..., :half] * cos - x[..., half : 2 * half] * sin,
                x[..., half : 2 * half] * cos + x[..., :half] * sin,
                x[..., 2 * half :],
            ),
            -1,
        )
        for x in (query, key)
    )
    for token, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, cache.shape[3])
        cache[block, 0, :, offset] = key[token].to(cache.dtype)
        cache[block, 1, :, offset] = value[token].to(cache.dtype)
    return query


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "dim", "rot_dim", "block_size"), CASES)
def test_equals_its_parts(
    dtype: torch.dtype,
    normed: bool,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rot_dim: int,
    block_size: int,
) -> None:
    if envs.TRITON_INTERPRET and dtype == torch.bfloat16:
        dtype = torch.float16  # its bfloat16 arithmetic is wrong
    check(torch.device("cpu"), dtype, normed, tokens, heads, kv_heads, dim, rot_dim, block_size)


def check(
    device: torch.device,
    dtype: torch.dtype,
    normed: bool,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rot_dim: int,
    block_size: int,
) -> None:
    """Cache and query, poison where nothing is written."""
    packed = torch.randn(tokens, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    positions = torch.randint(0, 200, (tokens,), device=device)
    cos_sin = torch.randn(200, rot_dim, device=device)
    blocks = tokens // block_size + 4
    slots = torch.randperm((blocks - 1) * block_size, device=device)[:tokens] + block_size
    cache = torch.full((blocks, 2, kv_heads, block_size, dim), torch.nan, dtype=dtype).to(device)
    norms = None
    if normed:
        norms = torch.randn(dim, device=device), torch.randn(dim, device=device), 1e-6
    wanted = cache.clone()
    query = _expected(packed, kv_heads, positions, cos_sin, wanted, slots, norms)
    got = rope_write(packed, kv_heads, positions, cos_sin, cache, slots, norms, _once)
    near = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.double(), query, rtol=near, atol=near)
    torch.testing.assert_close(cache, wanted, equal_nan=True, rtol=near, atol=near)


@pytest.mark.parametrize("compiled", [True, False])
def test_far_slots(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache whose elements an int32 cannot count."""
    if not compiled:
        monkeypatch.setattr(cpu, "library", lambda: None)
    first = 2**31 // (2 * 3 * 16 * 32) + 1
    cache = untouched(first + 4, 2, 3, 16, 32, dtype=torch.float32)
    packed, cos_sin = torch.randn(20, 10, 32), torch.randn(200, 32)
    positions, offsets = torch.randint(0, 200, (20,)), torch.randperm(64)[:20]
    wanted = torch.zeros(4, 2, 3, 16, 32)
    _expected(packed, 3, positions, cos_sin, wanted, offsets, None)
    rope_write(packed, 3, positions, cos_sin, cache, first * 16 + offsets, None, _once)
    torch.testing.assert_close(cache[first:], wanted)


def test_no_tokens() -> None:
    heads, cache = torch.empty(0, 4, 16), torch.zeros(2, 2, 1, 16, 16)
    none = torch.empty(0, dtype=torch.int64)
    query = rope_write_triton(heads, 1, none, torch.empty(4, 16), cache, none, None)
    assert query.shape == (0, 2, 16)


if not envs.TRITON_INTERPRET:

    def test_interpreted() -> None:
        run_interpreted(__file__)

    @pytest.mark.gpu
    @pytest.mark.parametrize("normed", [False, True])
    @pytest.mark.parametrize("sizes", CASES)
    def test_on_gpu(normed: bool, sizes: tuple[int, ...]) -> None:
        check(torch.device("cuda"), torch.bfloat16, normed, *sizes)

    @pytest.mark.parametrize("num_tokens", [1, 4096])
    @pytest.mark.parametrize("normed", [False, True])
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_compiles(arch: int, normed: bool, num_tokens: int) -> None:
        tokens, warps = tile_of(num_tokens)
        types = {"heads": "*bf16", "q_weight": "*bf16", "k_weight": "*bf16", "kv_cache": "*bf16"}
        types |= {"cos_sin_cache": "*fp32", "positions": "*i64", "slot_mapping": "*i64"}
        types |= dict.fromkeys(("num_tokens", "num_kv_heads", "block_size"), "i32") | {
            "eps": "fp32"
        }
        for rot_dim in (128, 96):
            compile_for(
                arch, module._rope_write_kernel, types, warps, HEAD_DIM=128, HALF=rot_dim // 2,
                TILE_T=tokens, TILE_H=next_power_of_2(rot_dim // 2),
                TILE_R=next_power_of_2(128 - rot_dim) if rot_dim < 128 else 0, NORM=normed,
                PDL=True,
            )  # fmt: skip
