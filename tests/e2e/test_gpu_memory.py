# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""On a GPU, what a started engine holds after graphs and a full batch is what it was allowed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.cli.capacity import block_bytes
from tests.helpers.dummy_model import gpu_engine, write_dummy_model

ROOT = Path(__file__).parents[2]
SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
         "vocab_size": 151_936}  # fmt: skip


def _used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def serve(folder: str, flags: str) -> dict[str, Any]:
    """In a process of its own: bytes in use on the card when ready and after a full batch."""
    settings = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "kv_cache_memory_bytes": None}
    engine = gpu_engine(Path(folder), **(settings | json.loads(flags)))
    ready = _used()
    draw = np.random.default_rng()
    kinds: list[dict[str, Any]] = [{"temperature": 1.0, "top_p": 0.9, "logprobs": 5}, {}]
    for _ in range(2):
        for number in range(256):
            prompt = draw.integers(5, 30_000, 300).tolist()
            engine.add(prompt, max_tokens=8, presence_penalty=0.5, **kinds[number % 2])
        engine.run()
    info, after = engine.info, _used()
    engine.close()
    pool = (info.num_kv_blocks + 1) * block_bytes(info.kv_specs, info.block_size)
    return {"ready": ready, "after": after, "total": torch.cuda.mem_get_info()[1], "pool": pool}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        {"gpu_memory": 24 << 30},
        {"gpu_memory_utilization": 0.5},
        {"gpu_memory": 30 << 30, "cudagraph_mode": "NONE"},
        {"kv_cache_memory_bytes": 3 << 30},
    ],
    ids=str,
)
def test_memory_is_what_was_allowed(flags: dict[str, Any], tmp_path: Path) -> None:
    folder = write_dummy_model(tmp_path, **SHAPE)
    command = [sys.executable, "-m", "tests.e2e.test_gpu_memory", str(folder), json.dumps(flags)]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    got = json.loads(done.stdout.splitlines()[-1])
    gib = {name: round(size / 2**30, 2) for name, size in got.items()}
    print(flags, gib)
    if "kv_cache_memory_bytes" in flags:
        assert abs(got["pool"] / flags["kv_cache_memory_bytes"] - 1) < 0.03, gib
        return
    limit = flags.get("gpu_memory") or flags["gpu_memory_utilization"] * got["total"]
    assert abs(got["after"] / limit - 1) < 0.03, gib
    assert got["ready"] < 1.03 * limit, gib


if __name__ == "__main__":
    print(json.dumps(serve(*sys.argv[1:])))
