# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmserve.core.messages import EngineRequest
from llmserve.core.request import Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import ModelRunnerOutput
from llmserve.core.structured_outputs import StructuredOutputsParams
from llmserve.structured_output.compiler import Tables
from llmserve.structured_output.manager import GrammarManager, GrammarRow
from llmserve.structured_output.prepare import prepare
from llmserve.structured_output.schema import MAX_WHITESPACE
from llmserve.structured_output.vocabulary import Vocabulary
from llmserve.structured_output.whitespace import Whitespace
from tests.helpers.grammar import BYTES, EOS, WORDS, allowed, backend, compiled

SPACES = [ord(c) for c in " \t\r\n"]


def test_what_a_text_ends_with_is_counted() -> None:
    rng = random.Random()
    tokens = ["".join(rng.choices(" \n\ta{é", k=rng.randint(0, 4))).encode() for _ in range(400)]
    made = Whitespace(Vocabulary([*tokens, b"q"], [0]))
    text, count = b"", 0
    for token in rng.choices(range(400), k=2000):
        text += tokens[token]
        count = made.after(count, token) if tokens[token] else count
        assert count == len(text) - len(text.rstrip(b" \n\t"))


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "string"}, "b": {"enum": [" " * 30]}}, "required": ["a"]},
        {"type": "array", "items": {"type": "string"}, "minItems": 3},
    ],
)
@pytest.mark.parametrize("compact", [False, True])
def test_a_text_does_not_go_on_for_ever(schema: dict[str, Any], compact: bool) -> None:
    """A writer that likes nothing better than whitespace gets as far as strings let it."""
    params = StructuredOutputsParams(json=schema, disable_any_whitespace=compact)
    spec = prepare(params, "xgrammar")
    made = compiled(spec)
    compiler: Any = SimpleNamespace(
        tables=Tables(backend("xgrammar").vocabulary), eos_token_ids=[EOS], get=lambda spec: made
    )
    manager = GrammarManager(compiler, len(BYTES.tokens), num_slots=2)
    rng, most, in_string = random.Random(), 0, 0
    for seed in range(20):
        sampling = SamplingParams(grammar=spec, ignore_eos=True)
        message = EngineRequest(
            client=0, request_id=seed, prompt=b"\0" * 4, params=sampling, arrival=0
        )
        request = Request(message, 1000, frozenset([EOS]))
        assert manager.enter(request.key, sampling)
        rows, words, text = {0: GrammarRow(0, request)}, np.zeros((1, WORDS), np.int32), ""
        while len(text) < 300:
            assert manager.fill(rows, words) == []
            may = [t for t in allowed(words[0]) if t != ord("\\")]
            if EOS in may:
                break
            token = rng.choice([t for t in may if t in SPACES and rng.random() < 0.97] or may)
            drawn = ModelRunnerOutput(np.array([[token]], np.int32), np.ones(1, np.int32))
            assert manager.advance([rows[0]], drawn) == []
            text += chr(token)
            run = len(text) - len(text.rstrip(" \t\r\n"))
            if text.count('"') % 2:
                in_string = max(in_string, run)
            else:
                most = max(most, run)
    assert most == (0 if compact else MAX_WHITESPACE)
    assert in_string > MAX_WHITESPACE
