# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from typing import Any

import pytest
from tokenizers import AddedToken

from llmserve.errors import RequestError
from llmserve.frontend.infill import INFILLS, find_infill
from llmserve.frontend.input_processor import InputProcessor
from llmserve.frontend.tokenizer import Tokenizer
from tests.helpers.api import byte_tokenizer, model_info


def _tokenizer(*markers: str) -> Tokenizer:
    plain = byte_tokenizer()
    plain._backend.add_special_tokens([AddedToken(marker) for marker in markers])
    return Tokenizer(plain._backend, plain.special_tokens)


@pytest.mark.parametrize("infill", INFILLS)
async def test_prompts_are_what_model_cards_show(infill: Any) -> None:
    tokenizer = _tokenizer(*(marker for marker in infill if marker))
    assert find_infill(tokenizer) == infill
    front = InputProcessor(
        model_info(logits_width=300), tokenizer, None, max_logprobs=20, default_template_kwargs={}
    )
    ids = await front.infill_prompt("def f(", "return x", add_special_tokens=True, param="prompt")
    text = tokenizer.decode(ids, skip_special_tokens=False)
    if infill.middle is None:
        assert text == "[SUFFIX]return x[PREFIX]def f("
    else:
        assert text == f"{infill.prefix}def f({infill.suffix}return x{infill.middle}"


async def test_a_model_that_was_not_taught_it() -> None:
    tokenizer = _tokenizer("<|fim_prefix|>", "<|fim_suffix|>")
    assert find_infill(tokenizer) is None
    front = InputProcessor(
        model_info(), tokenizer, None, max_logprobs=20, default_template_kwargs={}
    )
    with pytest.raises(RequestError) as info:
        await front.infill_prompt("a", "b", add_special_tokens=True, param="prompt")
    assert (info.value.param, info.value.code) == ("suffix", "unsupported_parameter")
