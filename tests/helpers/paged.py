# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Random paged batches, and attention over them in float64 without paging."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmserve.attention.base import AttentionMetadata, AttentionShape


@dataclass
class Case:
    """Queries, a poisoned cache and its metadata; `keys` and `values` are per row, unpaged."""

    shape: AttentionShape
    query: torch.Tensor
    kv_cache: torch.Tensor
    metadata: AttentionMetadata
    keys: list[torch.Tensor]  # [seq_len, num_kv_heads, head_dim]
    values: list[torch.Tensor]

    def count_on_device(self) -> None:
        """As a graph of mixed steps has it: the numbers of rows are bounds, the device is told."""
        of = self.metadata
        counts = [of.num_decode_rows, of.num_rows]
        of.row_counts = torch.tensor(counts, dtype=torch.int32).to(self.query.device)
        of.num_decode_rows = of.num_rows

    def expected(self) -> torch.Tensor:
        """float64 [num_tokens, num_heads, head_dim]."""
        out, start = [], 0
        group = self.shape.num_heads // self.shape.num_kv_heads
        for keys, values, n in zip(
            self.keys, self.values, self.metadata.query_lens_cpu, strict=True
        ):
            q = self.query[start : start + n].double()
            k = keys.double().repeat_interleave(group, 1)
            v = values.double().repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.shape.scale
            if self.shape.softcap is not None:
                scores = self.shape.softcap * torch.tanh(scores / self.shape.softcap)
            key_pos = torch.arange(len(keys))
            pos = torch.arange(len(keys) - n, len(keys))[:, None]
            hidden = key_pos > pos
            if self.shape.window is not None:
                hidden |= key_pos <= pos - self.shape.window
            scores.masked_fill_(hidden.to(scores.device), -math.inf)
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
            start += n
        return torch.cat(out)


def untouched(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no memory until they are written to."""
    zeros = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(zeros).view(dtype).view(shape)


def make_case(
    rows: list[tuple[int, int]],
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    device: str = "cpu",
    far: bool = False,
) -> Case:
    """`rows` are (query_len, seq_len), one-token rows first. All that no token wrote is NaN. `far`:
    all blocks lie where an int32 cannot count the elements before them."""
    gen = torch.Generator().manual_seed(torch.seed() if seed is None else seed)
    shape = AttentionShape(heads, kv_heads, head_dim, 2 / math.sqrt(head_dim), window, softcap)
    counts = [-(-length // block_size) for _, length in rows]
    page = (2, kv_heads, block_size, head_dim)
    first = 1 + far * 2**31 // math.prod(page)
    num_blocks = first + 2 * sum(counts)
    cache = untouched(num_blocks, *page, dtype=dtype)
    for poisoned in (cache[:1], cache[first:]):
        poisoned.fill_(math.nan)
    free = (first + torch.randperm(num_blocks - first, generator=gen)).tolist()
    table = torch.zeros(len(rows), max(counts) + 2, dtype=torch.int32)
    keys, values, slots = [], [], []
    for row, (query_len, length) in enumerate(rows):
        blocks = [free.pop() for _ in range(counts[row])]
        table[row, : len(blocks)] = torch.tensor(blocks)
        k, v = (torch.randn(length, kv_heads, head_dim, generator=gen).to(dtype) for _ in range(2))
        pos = torch.arange(length)
        block = table[row].long()[pos // block_size]
        cache[block, 0, :, pos % block_size] = k
        cache[block, 1, :, pos % block_size] = v
        if window is not None:  # blocks wholly behind every query's window are given back
            gone = max(0, length - query_len - window + 1) // block_size
            cache[table[row, :gone].long()] = math.nan
            table[row, :gone] = 0
        keys.append(k.to(device))
        values.append(v.to(device))
        slots.append((block * block_size + pos % block_size)[length - query_len :])
    query_lens = [n for n, _ in rows]
    lengths = [n for _, n in rows]
    num_tokens = sum(query_lens)
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, *query_lens]).cumsum(0).int().to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32).to(device),
        block_table=table.to(device),
        slot_mapping=torch.cat(slots).to(device),
        block_size=block_size,
        num_rows=len(rows),
        num_decode_rows=next((i for i, n in enumerate(query_lens) if n > 1), len(rows)),
        query_lens_cpu=query_lens,
        seq_lens_cpu=lengths,
    )
    # A slice of a wider projection, as layers hand it over.
    wide = torch.randn(num_tokens, heads + 2 * kv_heads, head_dim, generator=gen).to(dtype)
    return Case(shape, wide.to(device)[:, :heads], cache.to(device), metadata, keys, values)


CASES: dict[str, dict] = {
    "decode": {"rows": [(1, 1), (1, 16), (1, 17), (1, 33)]},
    "decode_one": {"rows": [(1, 45)]},
    "decode_spread": {"rows": [(1, 300), (1, 3), (1, 200), (1, 40), (1, 1)]},
    "prefill": {"rows": [(37, 37)]},
    "chunk": {"rows": [(21, 90)]},
    "mixed": {"rows": [(1, 31), (1, 64), (2, 2), (5, 70), (40, 40), (17, 33)]},
    "one_head": {"rows": [(1, 19), (9, 20)], "heads": 1, "kv_heads": 1},
    "smollm": {"rows": [(1, 70), (1, 5), (13, 29)], "heads": 9, "kv_heads": 3, "head_dim": 64},
    "odd_dim": {"rows": [(1, 33), (18, 50)], "head_dim": 80},
    "wide": {"rows": [(1, 33), (18, 50)], "head_dim": 256, "heads": 2, "kv_heads": 1},
    "window": {
        "rows": [(1, 5), (1, 24), (1, 25), (1, 130), (30, 30), (20, 100), (24, 24)],
        "window": 24,
    },
    "window_one": {"rows": [(1, 130)], "window": 24},
    "window_in_block": {"rows": [(1, 40), (1, 37), (4, 60)], "window": 3},
    "softcap": {"rows": [(1, 33), (1, 7), (18, 50), (20, 20)], "softcap": 1.5},
    "softcap_window": {"rows": [(1, 33), (18, 50)], "softcap": 1.5, "window": 10},
    "far": {"rows": [(1, 33), (1, 300), (18, 50)], "far": True},
    "block_8": {"rows": [(1, 33), (18, 50)], "block_size": 8},
    "split": {"rows": [(1, 700), (1, 90), (21, 900)], "heads": 2, "kv_heads": 1},
    "split_prompt": {"rows": [(70, 1500)], "heads": 1, "kv_heads": 1, "head_dim": 80},
    "split_window": {"rows": [(1, 900), (21, 900)], "heads": 2, "kv_heads": 1, "window": 600},
    "block_32": {"rows": [(1, 33), (1, 65), (18, 50)], "block_size": 32},
}


def run_interpreted(path: str) -> None:
    """Runs the tests of a file in a child process, where Triton is interpreted."""
    # exp of a large number is inf, as on a GPU; numpy warns of it.
    overflow = "ignore:overflow encountered:RuntimeWarning"
    interpret("pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", overflow, path)


def interpret(module: str, *args: str) -> str:
    """What `python -m module` prints with TRITON_INTERPRET=1, set before triton is imported."""
    root = Path(__file__).parents[2]
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": f"{root / 'src'}:{root}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", module, *args]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout
