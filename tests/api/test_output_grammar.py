# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What binds an answer, tried on texts with the engine that compiles it."""

import json
import random
from typing import Any

import jsonschema
import pytest

from llmserve.api.output_grammar import output_params
from llmserve.api.tools import read_tools
from llmserve.core.structured_outputs import StructuredOutputsParams
from llmserve.errors import RequestError
from llmserve.parsers.call_grammar import Thought
from llmserve.parsers.registry import TOOL_PARSERS, choose_parsers
from llmserve.structured_output.prepare import prepare
from tests.helpers.grammar import accepts, compiled, walk
from tests.helpers.parsers import Output

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ASKED = StructuredOutputsParams(json=SCHEMA, param="response_format")
CALL = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
F1, F2 = CALL.format("f", '{"a": 1}'), CALL.format("f", '{"a": "x"}')
FINAL = "<|channel|>final<|message|>"
G1 = CALL.format("g", "{}")


def tools(**strict: bool) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": "f", "parameters": SCHEMA, **strict}},
        {"type": "function", "function": {"name": "g"}},
    ]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def grammar(
    choice: Any,
    *,
    thought: tuple[str, ...] | None = None,
    asked: StructuredOutputsParams | None = None,
    parallel: bool = True,
    parser: str = "hermes",
    **strict: bool,
) -> Any:
    use = read_tools(tools(**strict), choice, parallel)
    params = output_params(
        use, choose_parsers("", "", parser, None), thought and Thought(*thought), asked
    )
    if params is None:
        return None
    return compiled(prepare(params, "auto"))


@pytest.mark.parametrize(
    ("choice", "parallel", "good", "bad"),
    [
        ("required", True, [F1, G1, f"{F1}\n{G1}"], ["", "Hello", F2, f"Hello {F1}", f"{F1} x"]),
        ("required", False, [F1, G1], [f"{F1}\n{G1}"]),
        (named("g"), True, [G1], [F1, "{}", "", f"{G1}\n{G1}"]),
    ],
)
def test_forced_calls(choice: Any, parallel: bool, good: list[str], bad: list[str]) -> None:
    made = grammar(choice, parallel=parallel)
    assert [text for text in good if not accepts(made, text)] == []
    assert [text for text in bad if accepts(made, text)] == []


def test_reasoning_is_free_and_comes_first() -> None:
    opened = grammar("required", thought=("", "</think>"))
    assert accepts(opened, f"so <tool_call> or {{\n</think>\n\n{F1}")
    assert not accepts(opened, f"so</think>{F2}") and not accepts(opened, "so</think>Hello")
    unopened = grammar("required", thought=("<think>", "</think>"))
    assert accepts(unopened, f"<think>so</think>{F1}") and accepts(unopened, F1)


def test_strict_binds_calls_and_leaves_text_free() -> None:
    made = grammar("auto", strict=True)
    assert accepts(made, f"Hello {F1} and {G1}") and accepts(made, "Hello")
    assert not accepts(made, F2) and not accepts(made, CALL.format("h", "{}"))
    assert grammar("auto") is None and grammar("none", strict=True) is None


def test_the_asked_shape_or_calls() -> None:
    made = grammar("auto", asked=ASKED, thought=("<think>", "</think>"))
    assert accepts(made, '{"a": 1}') and accepts(made, f"<think>x</think>{F1}")
    assert not accepts(made, '{"a": "x"}') and not accepts(made, F2) and not accepts(made, "Hello")
    alone = grammar("none", asked=ASKED)
    assert accepts(alone, '{"a": 1}') and not accepts(alone, F1)
    assert accepts(grammar("required", asked=ASKED), F1)
    assert not accepts(grammar("required", asked=ASKED), '{"a": 1}')


@pytest.mark.parametrize("name", [n for n in TOOL_PARSERS if TOOL_PARSERS.load(n).envelope])
def test_every_format_compiles_and_its_parser_reads_what_it_accepts(name: str) -> None:
    made = grammar("required", parser=name)
    envelope = TOOL_PARSERS.load(name).envelope
    nothing = {"json": "{}", "gemma": "{}", "functiongemma": "{}"}.get(envelope.style, "")
    written = {
        "json": '{"a": 1}',
        "qwen_xml": "<parameter=a>\n1\n</parameter>\n",
        "minimax_xml": '<parameter name="a">1</parameter>\n',
        "step3_xml": '<steptml:parameter name="a">1</steptml:parameter>\n',
        "deepseek_xml": '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n',
        "deepseek_v4_1_xml": '<｜DSML｜ parameter name="a" string="false">1</｜DSML｜ parameter>\n',
        "minimax_m3_xml": "]<]minimax[>[<a>1]<]minimax[>[</a>",
        "kimi_k3_xml": '<|open|>argument key="a" type="number"<|sep|>1<|close|>argument<|sep|>',
        "glm_xml": "<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n",
        "python": "a=1",
        "gemma": "{a:1}",
        "functiongemma": "{a:1}",
    }[envelope.style]

    def call(name: str, arguments: str) -> str:
        begin = envelope.begin.replace("{name}", name)
        begin += ("7" + envelope.numbered) * bool(envelope.numbered)
        return str(envelope.before + begin + arguments + envelope.end + envelope.after)

    text = call("f", written)
    assert accepts(made, text) and not accepts(made, text.replace("1", "no"))
    assert accepts(made, call("g", nothing))  # g has no parameters
    assert not accepts(made, call("g", written)) and not accepts(made, call("f", nothing))
    parser = choose_parsers("", "", name, "none").make({"f": SCHEMA}, "", False)
    parts = parser.feed(text) + parser.finish(True)
    arguments = "".join(part.text for part in parts if part.kind == "arguments")
    assert json.loads(arguments) == {"a": 1}


HARMONY = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant", FINAL)


def test_harmony_has_messages_of_every_kind() -> None:
    call = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'
    thought = f"{HARMONY[0]}hm{HARMONY[1]}"
    forced = grammar("required", parser="openai", thought=HARMONY)
    assert accepts(forced, call) and accepts(forced, thought + call)
    assert not accepts(forced, f"{FINAL}no") and not accepts(forced, f"{thought}{FINAL}no")
    assert not accepts(forced, call.replace("1", '"x"'))
    strict = grammar("auto", parser="openai", thought=HARMONY, strict=True)
    assert accepts(strict, f"{thought}{FINAL}any text") and accepts(strict, thought + call)
    assert not accepts(strict, call.replace("1", '"x"')) and not accepts(strict, "any text")
    shaped = grammar("none", parser="openai", thought=HARMONY, asked=ASKED)
    assert accepts(shaped, f'{thought}{FINAL}{{"a": 1}}')
    assert not accepts(shaped, '{"a": 1}') and not accepts(shaped, thought + call)


@pytest.mark.parametrize(
    "asked",
    [
        {"grammar": 'root ::= "yes"'},
        {"structural_tag": {"format": {"type": "const_string", "value": "yes"}}},
        {"regex": "yes"},
        {"choice": ["yes", "no"]},
    ],
)
def test_every_shape_comes_after_the_reasoning(asked: dict[str, Any]) -> None:
    params = StructuredOutputsParams(**asked)
    made = grammar("none", asked=params, thought=("", "</think>"))
    assert accepts(made, "so\n</think>\n\nyes")
    assert not accepts(made, "yes") and not accepts(made, "so</think>maybe")


def test_json_text_and_anything_at_all_come_after_it_too() -> None:
    thought = ("", "</think>")
    for schema in ('{"type": "null"}', {"type": "null"}):
        made = grammar("none", asked=StructuredOutputsParams(json=schema), thought=thought)
        assert accepts(made, "so</think>null") and not accepts(made, "null")
    made = grammar("none", asked=StructuredOutputsParams(json=True), thought=thought)
    assert accepts(made, "so</think>[1]") and not accepts(made, "so</think>x")


def test_lark_cannot_come_after_reasoning_that_has_begun() -> None:
    asked = StructuredOutputsParams(grammar='start: "yes"', param="structured_outputs")
    use = read_tools(None, None, True)
    parsers = choose_parsers("", "", "hermes", "think")
    assert output_params(use, parsers, Thought("<think>", "</think>"), asked) is asked
    with pytest.raises(RequestError, match="EBNF") as info:
        output_params(use, parsers, Thought("", "</think>"), asked)
    assert info.value.param == "structured_outputs"


def test_a_strict_tool_has_to_do_with_what_its_format_can_bind() -> None:
    bounded = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": bounded, "strict": True}}
    for choice in ("auto", "required"):
        for parser in ("pythonic", "gemma4"):
            parsers = choose_parsers("", "", parser, None)
            with pytest.raises(RequestError) as info:
                output_params(read_tools([tool], choice, True), parsers, None, None)
            assert info.value.param == "tools[0].function.parameters"
            assert "/properties/a/minimum" in info.value.message
    loose = {"type": "function", "function": {"name": "f", "parameters": bounded}}
    assert output_params(read_tools([loose], "required", True), parsers, None, None)


@pytest.mark.parametrize(
    ("choice", "fields", "param"),
    [
        ("required", {"parser": "none"}, "tool_choice"),
        ("auto", {"parser": "none", "strict": True}, "tools[0].function.strict"),
        ("required", {"asked": StructuredOutputsParams(regex="a")}, "structured_outputs"),
    ],
)
def test_what_cannot_be_enforced(choice: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as info:
        grammar(choice, **fields)
    assert info.value.param == param


@pytest.mark.parametrize("choice", ["required", named("f")])
def test_arguments_of_random_calls_are_valid(choice: Any) -> None:
    schemas = {"f": SCHEMA, "g": {"type": "object"}}
    use = read_tools(tools(strict=True), choice, True)
    params = output_params(use, choose_parsers("", "", "hermes", None), None, None)
    assert params is not None
    made, rng, found = compiled(prepare(params, "auto")), random.Random(), 0
    for _ in range(40):
        text = walk(made, rng)
        if text is None:
            continue
        calls = Output("hermes", tools=schemas).check_law(text.decode(), every_cut=False).calls
        assert calls
        for name, arguments in calls:
            found += 1
            assert choice == "required" or name == "f"
            jsonschema.validate(json.loads(arguments), schemas[name])
    assert found >= 20
