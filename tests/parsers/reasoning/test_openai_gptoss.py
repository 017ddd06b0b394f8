# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Harmony without tools."""

from llmserve.parsers.reasoning.openai_gptoss import HarmonyReasoning
from tests.helpers.parsers import Output, Parsed

TEXT = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes."


def test_channels() -> None:
    assert Output(None, "openai_gptoss").check_law(TEXT) == Parsed("Yes.", "hm")
    assert not HarmonyReasoning("<|start|>assistant", False).inside


def test_the_state_follows_the_channel() -> None:
    parser = Output(None, "openai_gptoss").parser()
    states = [(parser.feed(char), parser.in_reasoning)[1] for char in TEXT]
    assert states.index(True) == TEXT.index("hm") - 1
    assert not states[-1] and states.count(True) >= len("hm")
