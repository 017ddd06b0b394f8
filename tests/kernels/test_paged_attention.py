# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The attention kernels compile for both targets within the smallest shared memory.

What they compute is compared with float64 in tests/attention.
"""

import pytest

from llmserve import envs
from llmserve.kernels import paged_attention as module
from llmserve.kernels.paged_attention import num_splits, tile_sizes
from llmserve.kernels.triton_jit import next_power_of_2
from tests.helpers.compile_kernel import ARCHITECTURES, compile_for

_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_CONFIGS = [("bf16", 64), ("bf16", 80), ("bf16", 256), ("fp32", 256)]


def _compile(
    arch: int, decode: bool, kind: str, head_dim: int, window: int, soft: bool, programs: int = 264
) -> None:
    tile_q, tile_k, stages, warps = tile_sizes(head_dim, _SIZES[kind], decode)
    types = {"query": f"*{kind}", "kv_cache": f"*{kind}", "out": f"*{kind}", "softcap": "fp32"}
    types |= {"block_table": "*i32", "seq_lens": "*i32", "query_start": "*i32", "scale": "fp32"}
    types |= {"partial": "*fp32", "partial_lse": "*fp32", "arrived": "*i32", "row_counts": "*i32"}
    types |= {"first_row": "i32", "num_rows": "i32"}
    more = {"PDL": True} if decode else {"COUNTED": True, "LEAST_TILES": 4}
    compile_for(
        arch, module._decode_kernel if decode else module._prefill_kernel, types, warps, stages,
        HEADS=8, GROUP=4, HEAD_DIM=head_dim, BLOCK_SIZE=16, PROGRAMS=programs, SPLITS=32,
        TILE_Q=tile_q, TILE_K=tile_k, TILE_D=next_power_of_2(head_dim),
        WINDOW=window, SOFTCAP=soft, **more,
    )  # fmt: skip


if not envs.TRITON_INTERPRET:

    @pytest.mark.parametrize(("kind", "head_dim"), _CONFIGS)
    @pytest.mark.parametrize(("decode", "programs"), [(True, 0), (True, 264), (False, 264)])
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_compiles(arch: int, decode: bool, programs: int, kind: str, head_dim: int) -> None:
        _compile(arch, decode, kind, head_dim, 0, False, programs)

    @pytest.mark.parametrize("decode", [True, False])
    def test_compiles_with_window_and_softcap(decode: bool) -> None:
        _compile(120, decode, "bf16", 128, 512, True)


def test_num_splits_depends_on_rows_not_lengths() -> None:
    assert num_splits(1, 8, 131072, 132) == 32
    assert num_splits(64, 8, 131072, 132) == 1
    assert num_splits(1, 8, 512, 132) == 8
    assert num_splits(1, 8, 40, 132) == 1
