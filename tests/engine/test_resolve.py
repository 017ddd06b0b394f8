# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from typing import Any

import pytest

from llmserve.config.engine import EngineConfig
from llmserve.config.hf import ModelDescription, ModelSource
from llmserve.engine.resolve import Facts, resolve
from llmserve.errors import ConfigError
from llmserve.worker.device import DeviceInfo

MODEL = ModelDescription(
    source=ModelSource("folder", "/models/m", "m"),
    hf_config={},
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    max_model_len=4096,
    eos_token_ids=[2],
    bos_token_id=1,
    generation_defaults={},
    tokenizer="/models/m",
    chat_template=None,
)
CPU = DeviceInfo("cpu", "some CPU", 0, 32 << 30, True, 4)
OLD_CPU = DeviceInfo("cpu", "some old CPU", 0, 32 << 30, False, 4)
BIG = DeviceInfo("cuda", "big card", 12, 96 << 30, True, 0)
SMALL = DeviceInfo("cuda", "small card", 8, 24 << 30, True, 0)


def _resolve(device: DeviceInfo, **flags: Any) -> EngineConfig:
    return resolve(EngineConfig.from_flags(model="m", **flags), Facts(MODEL, device))


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (CPU, "auto", "bfloat16"),
        (OLD_CPU, "auto", "float32"),
        (BIG, "auto", "bfloat16"),
        (BIG, "half", "float16"),
        (CPU, "float", "float32"),
    ],
)
def test_dtype(device: DeviceInfo, dtype: str, expected: str) -> None:
    assert _resolve(device, dtype=dtype).model.dtype == expected


@pytest.mark.parametrize(
    ("device", "seqs", "tokens"), [(CPU, 64, 512), (SMALL, 256, 2048), (BIG, 1024, 8192)]
)
def test_budgets_follow_the_device(device: DeviceInfo, seqs: int, tokens: int) -> None:
    scheduler = _resolve(device).scheduler
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (seqs, tokens)


def test_budgets_that_were_given_stay() -> None:
    scheduler = _resolve(CPU, max_num_seqs=3, max_num_batched_tokens=7).scheduler
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (3, 7)


def test_whole_prompts_need_room_for_one() -> None:
    assert _resolve(CPU, enable_chunked_prefill=False).scheduler.max_num_batched_tokens == 4096
    with pytest.raises(ConfigError, match="4096.*512"):
        _resolve(CPU, enable_chunked_prefill=False, max_num_batched_tokens=512)


def test_threads() -> None:
    assert _resolve(CPU).device.cpu_threads == 4
    assert _resolve(CPU, cpu_threads=2).device.cpu_threads == 2


def test_context() -> None:
    assert _resolve(CPU).model.max_model_len == 4096
    assert _resolve(CPU, max_model_len=100).model.max_model_len == 100
    assert _resolve(CPU, max_model_len=-1).model.max_model_len == -1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_model_len": 5000}, "--max-model-len 5000.*4096"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "8.*--max-num-seqs 9"),
        ({"trust_remote_code": True}, "--trust-remote-code"),
        ({"quantization": "awq"}, "--quantization awq"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
    ],
)
def test_refusals_name_the_flag_and_the_numbers(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _resolve(CPU, **flags)


def test_unknown_keyword_gets_the_nearest_flag() -> None:
    with pytest.raises(ConfigError, match="did you mean --max-num-seqs"):
        EngineConfig.from_flags(model="m", max_num_seq=3)
