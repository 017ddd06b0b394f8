# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from llmserve.cli.capacity import block_bytes, contexts, gib, plan_table, started_table
from llmserve.core.kv_spec import AnyKVSpec, FullAttentionSpec, SlidingWindowSpec
from llmserve.core.messages import ModelInfo

LLAMA: list[AnyKVSpec] = [FullAttentionSpec(8, 128, 2)] * 32
GEMMA: list[AnyKVSpec] = [
    FullAttentionSpec(1, 256, 2) if (i + 1) % 6 == 0 else SlidingWindowSpec(1, 256, 2, 512)
    for i in range(26)
]


def rows(table: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.strip()}


def test_llama_table_against_hand_counted_totals() -> None:
    """Llama 3.1 8B in bfloat16: 2 x 32 x 8 x 128 x 2 bytes = 128 KiB a token, 2 MiB a block."""
    assert block_bytes(LLAMA, 16) == 2 << 20
    table = plan_table(
        model="llama", dtype="bfloat16", weight_bytes=16_060_522_496, specs=LLAMA, block_size=16,
        num_blocks=20_480, max_model_len=131_072, max_num_batched_tokens=8192,
    )  # fmt: skip
    assert "weights            14.96 GiB" in table
    assert "KV cache           40.00 GiB: 20,480 blocks of 2.0 MiB" in table
    assert "KV per token       128.0 KiB" in table
    cells = rows(table)
    assert cells["1,024"] == ["128.0", "MiB", "320"]
    assert cells["131,072"] == ["16.00", "GiB", "2"]
    assert cells["1"] == ["131,072"] and cells["8"] == ["40,960"] and cells["256"] == ["1,280"]


def test_gemma_table_holds_windows_only_once() -> None:
    """4 full layers grow by 1 KiB each a token; 22 windows of 512 do not grow past their chunk."""
    common = dict(model="g", dtype="bfloat16", weight_bytes=0, specs=GEMMA, block_size=16,
                  num_blocks=100_000, max_num_batched_tokens=512)  # fmt: skip
    table = plan_table(max_model_len=32_768, **common)  # type: ignore[arg-type]
    unit = block_bytes(GEMMA, 16)
    layers = unit // (2 * 256 * 2 * 16)
    full_groups = -(-4 // layers)
    assert f"KV per token       {gib(full_groups * unit / 16)}" in table
    windows = -(-22 // layers) * (-(-(511 + 512) // 16) + 1)
    assert rows(table)["32,768"][-1] == f"{100_000 // (full_groups * 2048 + windows):,}"


def test_context_that_never_fits_says_zero() -> None:
    table = plan_table(
        model="llama", dtype="bfloat16", weight_bytes=0, block_size=16, num_blocks=10,
        specs=[FullAttentionSpec(8, 128, 2)], max_model_len=1024, max_num_batched_tokens=8192,
    )  # fmt: skip
    assert rows(table)["1,024"][-1] == "0" and rows(table)["1"] == ["160"]


def test_started_table_says_the_same() -> None:
    info = ModelInfo(
        name="llama", architecture="LlamaForCausalLM", max_model_len=131_072, logits_width=1,
        eos_token_ids=[], bos_token_id=None, tokenizer="", chat_template=None,
        generation_defaults={}, dtype="bfloat16", num_kv_tokens=1, num_kv_blocks=20_480,
        block_size=16, weight_bytes=5 << 30, kv_specs=LLAMA, max_num_batched_tokens=8192,
        fingerprint="", cache_config={},
    )  # fmt: skip
    table = started_table(info)
    assert rows(table)["131,072"] == ["16.00", "GiB", "2"]
    assert "weights            5.00 GiB" in table


def test_units_and_contexts() -> None:
    assert [gib(1536), gib(92 << 20), gib(5 << 28)] == ["1.5 KiB", "92.0 MiB", "1.25 GiB"]
    assert contexts(8192) == [1024, 4096, 8192] and contexts(512) == [512]
