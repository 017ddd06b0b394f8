# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Reasoning in tags, most often `<think>`: one class a set of tags."""

from llmserve.parsers.tags import TagReasoning


class Think(TagReasoning):
    """Qwen 3, GLM, DeepSeek V3.1 and later, OLMo 3, Hunyuan, ERNIE and others."""

    opens, closes = ("<think>",), ("</think>",)
    markers = (*opens, *closes)


class ThinkUnopened(Think):
    """DeepSeek R1 and MiniMax M2: no opener comes from the model."""

    unopened = True


class SeedOss(TagReasoning):
    """Seed-OSS."""

    opens, closes = ("<seed:think>",), ("</seed:think>",)
    markers = (*opens, *closes)


class MinimaxM3(TagReasoning):
    """MiniMax M3."""

    opens, closes = ("<mm:think>",), ("</mm:think>",)
    skips = True
    markers = (*opens, *closes)


class Mistral(TagReasoning):
    """Magistral: tokens since tokenizer v13, text before."""

    opens, closes = ("[THINK]", "<think>"), ("[/THINK]", "</think>")
    markers = (*opens, *closes)


class Gemma4(TagReasoning):
    """Gemma 4's channel."""

    opens, closes = ("<|channel>thought",), ("<channel|>",)
    markers = ("<|channel>", "<channel|>")


class Cohere(TagReasoning):
    """Command A."""

    opens, closes = ("<|START_THINKING|>",), ("<|END_THINKING|>",)
    markers = (*opens, *closes)


class Granite(TagReasoning):
    """Granite 3.2: prose announces reasoning and answer."""

    opens = ("Here is my thought process:", "Here's my thought process:")
    closes = ("Here is my response:", "Here's my response:")
