# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Two ranks on gloo answer as one process does, and end with their executor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.core.scheduler_output import TokenMask
from llmserve.core.structured_outputs import GrammarSpec
from llmserve.errors import ConfigError, EngineError
from llmserve.executor.multiproc import MultiProcExecutor
from llmserve.executor.uniproc import UniProcExecutor
from tests.helpers.tiny_runner import describe_tiny
from tests.helpers.tiny_worker import generate, plan_of, tiny_config, tiny_kv

_PROMPT = [5, 9, 2, 40, 41, 3]


def test_two_ranks_equal_one_process() -> None:
    one = UniProcExecutor(tiny_config(), describe_tiny())
    one.initialize_kv_cache(tiny_kv(one.load()))
    want = generate(one, _PROMPT, 8)
    allowed = np.array([[0, 0b110, 0, 0]], np.int32)  # tokens 33 and 34
    bound: dict[str, Any] = {
        "mask": TokenMask(np.ones(1, np.int32), allowed),
        "grammar": GrammarSpec(backend="xgrammar", kind="regex", text="a"),
    }
    want_bound = generate(one, _PROMPT, 8, **bound)
    assert set(want_bound) <= {33, 34}
    one.shutdown()
    two = MultiProcExecutor(tiny_config(tensor_parallel_size=2), describe_tiny())
    try:
        folder = Path(two._folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        facts = two.load()
        assert facts.logits_width == 97
        two.initialize_kv_cache(tiny_kv(facts))
        assert generate(two, _PROMPT, 8, **bound) == want_bound
        assert generate(two, _PROMPT, 8) == want
        two._children[1].process.kill()
        two._children[1].process.wait()
        plan = plan_of(9, len(_PROMPT) + 7, 1)
        two.forward(plan)
        with pytest.raises(EngineError, match="rank 1 ended with code -9|rank 0: .*(closed|reset)"):
            two.sample(plan).result()
    finally:
        two.shutdown()
    two.shutdown()
    assert not folder.exists()
    assert all(child.process.returncode is not None for child in two._children)


def test_a_rank_that_cannot_start_says_why() -> None:
    config = tiny_config(attention_backend="triton_paged")
    executor = MultiProcExecutor(config, describe_tiny())
    try:
        with pytest.raises(ConfigError, match="triton_paged has no support for the CPU"):
            executor.load()
    finally:
        executor.shutdown()
