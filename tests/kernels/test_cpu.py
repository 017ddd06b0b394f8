# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Every compiled function against its torch reference, on fresh random inputs."""

import ctypes
import logging
from pathlib import Path
from typing import cast

import pytest
import torch

from llmserve import envs
from llmserve.kernels import cpu
from llmserve.kernels.fused_linear import fused_linear_torch
from llmserve.kernels.rms_norm import rms_norm_torch
from llmserve.kernels.silu_mul import gated_act_torch
from tests.helpers.compiler import has_compiler
from tests.helpers.paged import make_case

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

LIB = cast(cpu.Library, cpu.library())
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the dtype's tolerance of the largest value."""
    assert ours.shape == expected.shape and ours.isfinite().all()
    scale = expected.double().abs().max().item() if expected.numel() else 1.0
    atol = TOLERANCE[ours.dtype] * scale
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=atol)


def test_is_there_and_runs_on_torchs_own_threads() -> None:
    """A second OpenMP beside torch's would take its cores."""
    assert LIB is not None
    address = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    assert address is not None
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    runtimes = {line[5] for line in maps if len(line) > 5 and "gomp" in Path(line[5]).name}
    (holds,) = {
        line[5]
        for line in maps
        if len(line) > 5
        and int(line[0].split("-")[0], 16) <= address < int(line[0].split("-")[1], 16)
    }
    assert runtimes == {holds} and "torch" in holds


@pytest.mark.parametrize("act", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", range(18))
def test_linear(tokens: int, act: str | None) -> None:
    """Odd widths; what lies between the rows of the input is poison."""
    size, rows = (37, 70) if tokens % 2 else (96, 2 * (48 + tokens))
    wide = torch.full((tokens, size + 8), torch.nan)
    wide[:, :size] = torch.randn(tokens, size)
    x = wide[:, :size] if tokens % 3 else wide[:, :size].contiguous()
    weight, bias = torch.randn(rows, size), torch.randn(rows) if tokens % 2 else None
    norm = (torch.randn(size), 1e-5) if tokens % 3 else None
    residual = torch.randn(tokens, rows // (2 if act else 1)) if tokens % 4 else None
    expected = fused_linear_torch(
        x.double(), weight.double(), None if bias is None else bias.double(),
        None if norm is None else (norm[0].double(), norm[1]), act,
        None if residual is None else residual.double(),
    )  # fmt: skip
    ours = cpu.linear(cpu.Product(LIB, weight, bias), x, norm, act, residual)
    assert residual is None or ours is residual
    close(ours, expected)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    x, weight = torch.randn(17, 100), torch.randn(500, 100)
    product = cpu.Product(LIB, weight)
    whole = cpu.linear(product, x)
    for rows in (1, 2, 5, 8, 9, 16):
        assert torch.equal(cpu.linear(product, x[:rows]), whole[:rows])


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("tokens", [0, 1, 8, 15, 16, 17, 32, 33, 70, 600])
def test_linear_in_bfloat16(tokens: int, act: str | None) -> None:
    """By tiles, whole ones and parts, of one block of tokens and of several."""
    size, rows = 32 * (1 + tokens % 3), 2 * (64 if tokens % 2 else 41)
    wide = torch.full((tokens, size + 8), torch.nan, dtype=torch.bfloat16)
    wide[:, :size] = torch.randn(tokens, size)
    x, weight = wide[:, :size], torch.randn(rows, size, dtype=torch.bfloat16)
    if not (LIB.has_tiles and cpu.product_of(weight)):
        assert not (LIB.has_tiles or cpu.product_of(weight))
        return
    bias = torch.randn(rows, dtype=torch.bfloat16) if tokens % 2 else None
    norm_weight = torch.randn(size, dtype=DTYPES[tokens % 2])
    norm = (norm_weight, 1e-5) if tokens % 5 else None
    columns = rows // (2 if act else 1)
    residual = torch.randn(tokens, columns, dtype=torch.bfloat16) if tokens % 4 else None
    expected = fused_linear_torch(
        (x if norm is None else rms_norm_torch(x, *norm)).double(), weight.double(),
        None if bias is None else bias.double(), None, act,
        None if residual is None else residual.double(),
    )  # fmt: skip
    product = cpu.product_of(weight, bias)
    ours = cpu.linear(product, x, norm, act, None if residual is None else residual.clone())
    assert ours.dtype == torch.bfloat16
    close(ours, expected)
    if residual is None and norm is None:
        exact = cpu.linear(product, x, None, act, dtype=torch.float32)
        close(exact, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    before = torch.get_num_threads()
    x, product = torch.randn(4, 64), cpu.Product(LIB, torch.randn(3000, 64))
    expected = cpu.linear(product, x)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(cpu.linear(product, x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 16, 100, 576])
def test_rms_norm(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(size % 7 + 1, size + 3, dtype=dtype)[:, :size]
    for weight in (torch.randn(size, dtype=dtype), torch.randn(size)):
        close(cpu.rms_norm(LIB, x, weight, 1e-5), rms_norm_torch(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", [3, 64, 200])
def test_gated_act(dtype: torch.dtype, kind: str, size: int) -> None:
    """Also where exp overflows or is 0."""
    x = torch.randn(40, 2 * size, dtype=dtype) * torch.logspace(-2, 3, 40).unsqueeze(1).to(dtype)
    close(cpu.gated_act(LIB, x, kind), gated_act_torch(x.float(), kind).to(dtype))
    x[0, 0] = torch.nan
    assert cpu.gated_act(LIB, x, kind)[0, 0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 5.0), (200, 3.0)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"), [(9, 3, 64, 16), (4, 4, 16, 8), (5, 1, 80, 32)]
)
def test_attention(
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
) -> None:
    """Contexts of one token, of whole blocks and of several parts, poison behind their ends."""
    lengths = [1, 16, 17, 128, 129, 401]
    case = make_case(
        [(1, length) for length in lengths], heads=heads, kv_heads=kv_heads, head_dim=dim,
        block_size=block_size, window=window, softcap=softcap, dtype=dtype,
    )  # fmt: skip
    meta = case.metadata
    out = torch.full_like(case.query, torch.nan)
    cpu.attention(
        LIB, case.query, case.kv_cache, meta.block_table, meta.seq_lens, out, case.shape.scale,
        window, softcap,
    )  # fmt: skip
    close(out, case.expected())


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype) -> None:
    table, ids = torch.randn(50, 20, dtype=dtype), torch.tensor([49, 0, 7])
    assert torch.equal(cpu.embedding(LIB, table, ids, 1.0), table[ids])
    assert torch.equal(cpu.embedding(LIB, table, ids, 34.0), table[ids] * 34.0)
    out = cpu.embedding(LIB, table, torch.tensor([50, 1, -1]), 1.0)
    assert out[[0, 2]].isnan().all() and torch.equal(out[1], table[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_recording_repeats_every_function_with_fewer_tokens(dtype: torch.dtype) -> None:
    heads, kv_heads, dim, tokens = 4, 2, 16, 6
    width = (heads + 2 * kv_heads) * dim
    table = torch.randn(30, 64, dtype=dtype)
    weight = torch.randn(width, 64, dtype=dtype) / 8
    product = cpu.product_of(weight) if dtype == torch.float32 or LIB.has_tiles else None
    norm, cos_sin = torch.randn(64, dtype=dtype), torch.randn(40, dim)
    cache = torch.zeros(5, 2, kv_heads, 8, dim, dtype=dtype)
    ids, positions = torch.zeros(2, tokens, dtype=torch.int64)
    slots, lengths = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens, dtype=torch.int32)
    blocks = torch.zeros(tokens, 3, dtype=torch.int32)

    def forward(n: int = tokens) -> torch.Tensor:
        x = cpu.embedding(LIB, table, ids[:n], 2.0)
        x = cpu.rms_norm(LIB, x, norm, 1e-5)
        qkv = x.repeat(1, width // 64) if product is None else cpu.linear(product, x, (norm, 1e-5))
        query = cpu.rope_write(
            LIB, qkv.view(n, -1, dim), kv_heads, positions[:n], cos_sin, cache, slots[:n], None
        )
        out = torch.empty(query.shape, dtype=dtype)
        cpu.attention(LIB, query, cache, blocks, lengths, out, 0.25, 6, 9.0)
        return cpu.gated_act(LIB, out.view(n, -1), "silu")

    recording = cpu.Recording(LIB, forward)
    assert recording.foreign == (None if product is not None else "aten.repeat.default")
    for n in (tokens, 1, 4):
        ids[:n], positions[:n] = torch.randint(0, 30, (n,)), torch.randint(0, 16, (n,))
        blocks[:n] = torch.randperm(4)[:3] + 1
        lengths[:n] = positions[:n] + 1
        slots[:n] = blocks[torch.arange(n), positions[:n] // 8] * 8 + positions[:n] % 8
        before = cache.clone()
        expected = forward(n)
        written, _ = cache.clone(), cache.copy_(before)
        recording.result.fill_(torch.nan)
        if product is not None:
            recording.run(n)
            assert torch.equal(recording.result[:n], expected) and torch.equal(cache, written)
            assert recording.result[n:].isnan().all()


def test_attention_of_many_long_rows_in_turns() -> None:
    """More than is kept of their parts at once."""
    lengths = [1300 + 70 * row for row in range(7)]
    case = make_case([(1, n) for n in lengths], heads=64, kv_heads=1, head_dim=64)
    out = torch.full_like(case.query, torch.nan)
    meta = case.metadata
    cpu.attention(
        LIB, case.query, case.kv_cache, meta.block_table, meta.seq_lens, out, case.shape.scale,
        None, None,
    )  # fmt: skip
    close(out, case.expected())


def test_what_it_is_for() -> None:
    assert cpu.compiled_for(torch.empty(0)) is (None if envs.TRITON_INTERPRET else LIB)
    assert cpu.compiled_for(torch.empty(0, dtype=torch.float16)) is None
    assert cpu.compiled_for(torch.empty(0, dtype=torch.int64)) is None


def test_without_a_compiler_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(envs, "CXX", "no-such-compiler")
    monkeypatch.setattr(logging.getLogger("llmserve"), "propagate", True)
    assert cpu._library.__wrapped__() is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "torch's own" in record.message and "CXX=no-such-compiler" in record.message
