# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Names, the automatic choice, and what holds for every format."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.errors import ConfigError
from llmserve.parsers.registry import (
    REASONING_ALIASES,
    REASONING_PARSERS,
    TOOL_ALIASES,
    TOOL_PARSERS,
    choose_parsers,
)
from tests.helpers.parsers import MARKERS, Output, Parsed, join, soup


def names(template: str, architecture: str = "X", **flags: str) -> tuple[str | None, str | None]:
    flags = {"tool": "", "reasoning": ""} | flags
    parsers = choose_parsers(
        template, architecture, flags["tool"] or None, flags["reasoning"] or None
    )
    return (
        parsers.tool.__name__ if parsers.tool else None,
        parsers.reasoning.__name__ if parsers.reasoning else None,
    )


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{{ messages }}", ("Hermes", None)),
        ("<think> <tool_call>\\n{{ tool_call.name }}", ("Hermes", "Think")),
        ("<tool_call> <function= <parameter= <think>", ("Qwen3Coder", "Think")),
        ("<|start|>assistant<|channel|>", ("Harmony", "HarmonyReasoning")),
        ("<｜tool▁calls▁begin｜> ```json", ("DeepseekV3", None)),
        ("<｜tool▁calls▁begin｜> </think>", ("DeepseekV31", "Think")),
        ("[TOOL_CALLS] [ARGS] [THINK]", ("Mistral", "Mistral")),
        ("[TOOL_CALLS]", ("MistralArray", None)),
        ("<tool_call> <arg_key> <think>", ("Glm", "Think")),
        ("<minimax:tool_call> <invoke <think>", ("MinimaxM2", "ThinkUnopened")),
        ("<|tool_call> <tool_call|> <|channel>thought", ("Gemma4", "Gemma4")),
        ("<|tool_calls_section_begin|> <think>", ("KimiK2", "Think")),
        ("<seed:tool_call> <seed:think>", ("SeedOss", "SeedOss")),
        ("Environment: ipython", ("LlamaJson", None)),
        ("<｜DSML｜function_calls> </think>", ("DeepseekV32", "Think")),
        ("<｜DSML｜tool_calls> </think>", ("DeepseekV4", "Think")),
        ("<｜DSML｜ calls>", ("DeepseekV41", None)),
        ("<start_function_call>", ("FunctionGemma", None)),
        ("<|START_ACTION|> <|START_THINKING|>", ("CohereCommand3", "Cohere")),
        ("<|tools_prefix|>", ("Apertus", None)),
        ("]<]minimax[>[ <mm:think>", ("MinimaxM3", "MinimaxM3")),
        ("<tool_calls> <tool_call> <tool_sep> <arg_key> <think>", ("HyV3", "Think")),
        ("<|open|> <|close|> <|sep|>", ("KimiK3", "KimiK3")),
        ('[{"name": "tool_call_name", "arguments": {"arg1": "value1"}}, ...', ("Xlam", None)),
        ("<steptml:invoke <think>", ("Step3", "Think")),
        ("<|action_start|>", ("Internlm", None)),
        ("<tool_calls>", ("Jamba", None)),
        ("functools[", ("Phi4Mini", None)),
        ("<function_call>", ("Granite20b", None)),
    ],
)
def test_the_template_decides(template: str, wanted: tuple[str | None, str | None]) -> None:
    assert names(template) == wanted


def test_the_architecture_where_the_template_says_nothing_and_the_flag_over_both() -> None:
    assert names("", "GptOssForCausalLM") == ("Harmony", "HarmonyReasoning")
    assert names("<tool_call> <think>", tool="none", reasoning="none") == (None, None)
    assert names("<tool_call>", tool="qwen3_xml", reasoning="qwen3") == ("Qwen3Coder", "Think")


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="unknown tool call parser 'herms'; did you mean 'hermes'"
    ):
        choose_parsers("", "", "herms", None)
    with pytest.raises(ConfigError, match="unknown reasoning parser"):
        choose_parsers("", "", None, "x")


def test_aliases_lead_to_entries_and_hide_none() -> None:
    assert set(TOOL_ALIASES.values()) <= set(TOOL_PARSERS) and not TOOL_ALIASES.keys() & set(
        TOOL_PARSERS
    )
    assert set(REASONING_ALIASES.values()) <= set(REASONING_PARSERS)
    assert not REASONING_ALIASES.keys() & set(REASONING_PARSERS)


@pytest.mark.parametrize("name", TOOL_PARSERS)
@settings(max_examples=50)
@given(data=st.data())
def test_no_output_raises_and_no_cut_matters(name: str, data: st.DataObject) -> None:
    parser = TOOL_PARSERS.load(name)
    own = [*parser.openers, *parser.markers, *MARKERS[:8], "<think>", "</think>"]
    own += [
        value for key, value in vars(parser).items() if isinstance(value, str) and "__" not in key
    ]
    output = Output(name, data.draw(st.sampled_from([None, "think"])), {"f": {}})
    output.check_law(data.draw(soup(*own)), every_cut=False)


HOSTILE = {
    "brackets": "[" * 1_000_000,
    "braces": '{"a":' * 200_000,
    "angles": "<" * 1_000_000,
    "openers": "<tool_call>" * 90_000,
    "calls": '<tool_call>{"name": "f", "arguments": ' * 25_000,
    "unclosed": '<tool_call>{"name": "f", "arguments": {"a": "' + "x\\" * 500_000,
    "deep": '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 200_000,
    "held": '<tool_call>{"arguments": ' + "[" * 1_000_000,
    "space": " \n" * 500_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_million_hostile_characters_take_no_time(text: str) -> None:
    """In seconds of this process: ten times the text may take ten times as long, not a hundred."""
    for name in ("hermes", "llama3_json", "pythonic", "qwen3_coder", "openai"):

        def cost(text: str, name: str = name) -> float:
            parser = Output(name, "think").parser()
            start = time.process_time()
            join(parser.feed(text) + parser.finish(True))
            return time.process_time() - start

        few = max(cost(text[: len(text) // 10]), 2e-3)
        assert cost(text) < 40 * few


_JSON = '"a": "'
OPEN = {  # a call up to where a long text stands in its arguments
    "hermes": '<tool_call>{"name": "f", "arguments": {' + _JSON,
    "longcat": '<longcat_tool_call>{"name": "f", "arguments": {' + _JSON,
    "llama3_json": '{"name": "f", "parameters": {' + _JSON,
    "pythonic": '[f(a="',
    "lfm2": '<|tool_call_start|>[f(a="',
    "olmo3": '<function_calls>f(a="',
    "mistral": "[TOOL_CALLS]f[ARGS]{" + _JSON,
    "mistral_array": '[TOOL_CALLS][{"name": "f", "arguments": {' + _JSON,
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"
    + _JSON,
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{" + _JSON,
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="true">',
    "openai": "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{" + _JSON,
    "qwen3_coder": "<tool_call><function=f><parameter=a>",
    "seed_oss": "<seed:tool_call><function=f><parameter=a>",
    "glm45": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
    "<|tool_call_argument_begin|>{" + _JSON,
    "kimi_k3": '<|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|>'
    '<|open|>argument key="a" type="string"<|sep|>',
    "hy_v3": "<tool_calls>\n<tool_call>f<tool_sep>\n<arg_key>a</arg_key>\n<arg_value>",
    "minimax_m3": ']<]minimax[>[<tool_call>]<]minimax[>[<invoke name="f">]<]minimax[>[<a>',
    "minimax_m2": '<minimax:tool_call><invoke name="f"><parameter name="a">',
    "gemma4": '<|tool_call>call:f{a:<|"|>',
    "granite": '<|tool_call|>[{"name": "f", "arguments": {' + _JSON,
    "deepseek_v4": '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="true">',
    "deepseek_v41": '<｜DSML｜ calls>\n<｜DSML｜ invoke name="f">\n'
    '<｜DSML｜ parameter name="a" string="true">',
    "functiongemma": "<start_function_call>call:f{a:<escape>",
    "granite-20b-fc": '<function_call> {"name": "f", "arguments": {' + _JSON,
    "phi4_mini_json": 'functools[{"name": "f", "arguments": {' + _JSON,
    "internlm": '<|action_start|><|plugin|>{"name": "f", "parameters": {' + _JSON,
    "jamba": '<tool_calls>[{"name": "f", "arguments": {' + _JSON,
    "cohere_command3": '<|START_ACTION|>[{"tool_name": "f", "parameters": {' + _JSON,
    "apertus": '<|tools_prefix|>[{"f": {' + _JSON,
    "xlam": '[{"name": "f", "arguments": {' + _JSON,
    "step3": "<｜tool_call_begin｜>function<｜tool_sep｜>"
    '<steptml:invoke name="f"><steptml:parameter name="a">',
}
# Of these another one has the code
_ALIKE = {
    "longcat", "lfm2", "olmo3", "mistral_array", "seed_oss", "deepseek_v4", "deepseek_v41",
    "functiongemma", "granite-20b-fc", "phi4_mini_json", "internlm", "jamba", "cohere_command3",
    "hy_v3", "xlam",
}  # fmt: skip
HELD = '<tool_call>{"arguments": {"a": "'  # the name may follow: nothing is certain yet
TEXTS = [(name, "", OPEN[name], "word </x ") for name in OPEN if name not in _ALIKE]
TEXTS += [
    ("hermes", "think", "", " the cat<b> sat\n\n"),
    ("hermes", "think", HELD, "word <x \\n"),
    ("hermes", "think", "<think>", "so <or\n"),
    ("openai", "openai_gptoss", "<|channel|>analysis<|message|>", "so <|or\n"),
]


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_arguments_stream(name: str) -> None:
    """Or, where a format needs a call's end to understand it, come whole."""
    parser = Output(name, tools={"f": {}}).parser()
    parts = parser.feed(OPEN[name] + "word " * 20)
    held = name in ("pythonic", "lfm2", "olmo3", "gemma4", "functiongemma", "minimax_m3")
    text = "".join(part.text for part in parts if part.kind == "arguments")
    assert ("word word" in text) != held


@pytest.mark.parametrize(("tool", "reasoning", "head", "body"), TEXTS)
def test_tokens_cost_the_same_in_long_outputs(
    tool: str, reasoning: str, head: str, body: str
) -> None:
    """Quadratic work would make 100k tokens 10 times as dear a token as 10k, and 100 times as dear
    as 1k. Seconds of this process alone: others may be busy."""
    output = Output(tool, reasoning or None, {"f": {}})

    def cost(tokens: int) -> float:
        parser = output.parser()
        parser.feed(head)
        text = body * (tokens * 4 // len(body) + 1)
        start = time.process_time()
        for at in range(0, tokens * 4, 4):
            parser.feed(text[at : at + 4])
        parser.finish(True)
        return (time.process_time() - start) / tokens

    few, some = (min(cost(tokens) for _ in range(2)) for tokens in (1_000, 10_000))
    assert cost(100_000) < 4 * min(few, some)


RENDERED = json.loads(Path(__file__).with_name("rendered.json").read_text())


@pytest.mark.parametrize("case", RENDERED)
def test_what_published_templates_render(case: dict[str, Any]) -> None:
    """Assistant messages as the templates of Qwen 3 and DeepSeek V3 write them."""
    output = Output(case["tool"], case["reasoning"], prompt=case["prompt"])
    wanted = Parsed(case["content"], case["thought"], [tuple(call) for call in case["calls"]])
    assert output.check_law(case["text"]) == wanted
