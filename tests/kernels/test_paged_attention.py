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
_CONFIGS = [("bf16", 64), ("bf16", 80), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 256)]


def _compile(
    arch: int, name: str, kind: str, head_dim: int, window: int, soft: bool, programs: int = 264
) -> None:
    decode = name == "decode"
    tile_q, tile_k, stages, warps = tile_sizes(head_dim, _SIZES[kind], decode)
    types = {"query": f"*{kind}", "kv_cache": f"*{kind}", "out": f"*{kind}", "softcap": "fp32"}
    types |= {"block_table": "*i32", "seq_lens": "*i32", "query_start": "*i32", "scale": "fp32"}
    types |= {"partial": "*fp32", "partial_lse": "*fp32", "arrived": "*i32", "row_counts": "*i32"}
    types |= {"first_row": "i32", "num_rows": "i32", "most_splits": "i32"}
    constants = {
        "HEADS": 8, "GROUP": 4, "HEAD_DIM": head_dim, "PROGRAMS": programs, "TILE_Q": tile_q,
        "TILE_K": tile_k, "TILE_D": next_power_of_2(head_dim), "WINDOW": window, "PDL": True,
    }  # fmt: skip
    if name != "decode":
        constants |= {"COUNTED": True, "LEAST_TILES": 4}
    if name != "join":
        constants |= {"BLOCK_SIZE": 16, "SOFTCAP": soft}
    if name != "prefill":
        constants["SPLITS"] = 32
    if name == "join":
        constants["JOINED"], warps, stages = 4, 4, 3  # Triton's own
    compile_for(arch, getattr(module, f"_{name}_kernel"), types, warps, stages, **constants)


if not envs.TRITON_INTERPRET:

    @pytest.mark.parametrize(("kind", "head_dim"), _CONFIGS)
    @pytest.mark.parametrize(
        ("name", "programs"), [("decode", 0), ("decode", 264), ("prefill", 132), ("join", 132)]
    )
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_compiles(arch: int, name: str, programs: int, kind: str, head_dim: int) -> None:
        _compile(arch, name, kind, head_dim, 0, False, programs)

    @pytest.mark.parametrize("name", ["decode", "prefill", "join"])
    def test_compiles_with_window_and_softcap(name: str) -> None:
        _compile(120, name, "bf16", 128, 512, True)


def test_num_splits_depends_on_rows_not_lengths() -> None:
    assert num_splits(1, 8, 131072, 132) == 32
    assert num_splits(64, 8, 131072, 132) == 1
    assert num_splits(1, 8, 512, 132) == 8
    assert num_splits(1, 8, 40, 132) == 1
