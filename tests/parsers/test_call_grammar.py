# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What grammars make a model write is what its parser reads."""

import json
import random
from typing import Any

import jsonschema
import pytest

from llmserve.parsers.call_grammar import forced_calls, free_calls
from llmserve.parsers.registry import REASONING_PARSERS, TOOL_PARSERS
from tests.helpers.grammar import grammar, walk
from tests.helpers.parsers import Output, Parsed, loaded

CHANNELS = (
    "openai",
    "kimi_k3",
    "xlam",
)  # or which have no marker  # whose messages say what is text
NAMES = [name for name in TOOL_PARSERS if TOOL_PARSERS.load(name).envelope is not None]
IN_TAGS = [n for n in NAMES if TOOL_PARSERS.load(n).envelope.style.endswith("_xml")]
SCHEMA = {"type": "object", "properties": {"s": {"type": "string"}, "i": {"type": "integer"}}}
VALUES = {"s": 'é "<x', "i": 5}
WRITTEN = {
    "json": json.dumps(VALUES),
    "qwen_xml": "<parameter=s>\n{s}\n</parameter>\n<parameter=i>\n{i}\n</parameter>\n",
    "minimax_xml": '<parameter name="s">{s}</parameter>\n<parameter name="i">{i}</parameter>\n',
    "step3_xml": '<steptml:parameter name="s">{s}</steptml:parameter>\n'
    '<steptml:parameter name="i">{i}</steptml:parameter>\n',
    "deepseek_xml": '<｜DSML｜parameter name="s" string="true">{s}</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="i" string="false">{i}</｜DSML｜parameter>\n',
    "deepseek_v4_1_xml": '<｜DSML｜ parameter name="s" string="true">{s}</｜DSML｜ parameter>\n'
    '<｜DSML｜ parameter name="i" string="false">{i}</｜DSML｜ parameter>\n',
    "minimax_m3_xml": "]<]minimax[>[<s>{s}]<]minimax[>[</s>\n]<]minimax[>[<i>{i}]<]minimax[>[</i>",
    "kimi_k3_xml": '<|open|>argument key="s" type="string"<|sep|>{s}<|close|>argument<|sep|>'
    '<|open|>argument key="i" type="number"<|sep|>{i}<|close|>argument<|sep|>',
    "glm_xml": "<arg_key>s</arg_key>\n<arg_value>{s}</arg_value>\n<arg_key>i</arg_key>\n"
    "<arg_value>{i}</arg_value>\n",
}
LITERALS = {
    "python": 's="é \\"<x", i=5',
    "gemma": '{s:<|"|>é "<x<|"|>,i:5}',
    "functiongemma": '{s:<escape>é "<x<escape>,i:5}',
}


def sentences(part: dict[str, Any]) -> str:
    """A text of a format: the longest, with two calls and some reasoning."""
    match part["type"]:
        case "const_string":
            return str(part["value"])
        case "regex":
            return {"[ \\n]{0,4}": "\n\n", "[0-9]{1,4}": "7"}[part["pattern"]]
        case "any_text":
            return "hm"
        case "optional":
            return sentences(part["content"])
        case "or":
            return sentences(part["elements"][-1])
        case "sequence":
            return "".join(map(sentences, part["elements"]))
        case "tag":
            return part["begin"] + sentences(part["content"]) + part["end"]
        case "tags_with_separator":
            tags = part["tags"][:1] if part["stop_after_first"] else part["tags"]
            return str(part["separator"]).join(map(sentences, tags))
        case "grammar":
            for style, sign in (("functiongemma", "<escape>"), ("gemma", '<|\\"|>')):
                if sign in part["grammar"]:
                    return LITERALS[style]
            return LITERALS["python"]
        case "json_schema":
            text = WRITTEN[part["style"]]
            return text if part["style"] == "json" else text.format(**VALUES)
    raise AssertionError(part)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_parser_reads_what_is_forced(name: str, parallel: bool) -> None:
    schemas = {"f": SCHEMA, "g-2": SCHEMA}
    output = Output(name, tools=schemas)
    grammar = forced_calls(TOOL_PARSERS.load(name).envelope, schemas, None, parallel)
    found = output.check_law(sentences(grammar), every_cut=False)
    several = parallel and not TOOL_PARSERS.load(name).envelope.single
    wanted = [("f", VALUES), ("g-2", VALUES)][: 1 + several]
    assert (found.content, found.reasoning, loaded(found)) == ("", "", wanted)


@pytest.mark.parametrize("name", [n for n in IN_TAGS if n != "minimax_m3"])
def test_what_stands_in_broken_tags_is_not_lost(name: str) -> None:
    """It is an argument, or content."""
    text = sentences(forced_calls(TOOL_PARSERS.load(name).envelope, {"f": SCHEMA}, None, True))
    output = Output(name, tools={"f": SCHEMA})
    for at in range(len(text)):
        broken = text[:at] + " " * 600 + text[at:]
        found = output.check_law(broken, every_cut=False) if at % 20 == 0 else output.parse(broken)
        said = "".join([found.content, *(arguments for _, arguments in found.calls)])
        assert "<x" in said.replace(" ", "") and "5" in said, broken


@pytest.mark.parametrize("name", NAMES)
def test_what_is_cut_off_behind_a_call_is_no_content(name: str) -> None:
    """It began another, or ended the last; but what the model wrote behind its calls is."""
    schemas = {"f": SCHEMA, "g-2": SCHEMA}
    output = Output(name, tools=schemas)
    text = sentences(forced_calls(TOOL_PARSERS.load(name).envelope, schemas, None, True))
    for at in range(1, len(text)):
        found = output.parse(text[:at], complete=False)
        assert not (found.calls and found.content), text[:at]
        assert output.parse(*text[:at], complete=False) == found


def test_what_follows_a_call_is_content_though_it_is_cut_off() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>\nso <b'
    assert Output("hermes", tools={}).parse(text, complete=False).content == "\nso <b"


@pytest.mark.parametrize("name", NAMES)
def test_the_parser_reads_what_a_grammar_makes(name: str) -> None:
    """Random texts of the compiled grammar, whose strings hold much that looks like markers, and
    bytes that are no UTF-8, which reach a parser as U+FFFD."""
    parser, schemas = TOOL_PARSERS.load(name), {"f": SCHEMA, "g-2": {}}
    bound = grammar(structural_tag={"format": forced_calls(parser.envelope, schemas, None, True)})
    rng, texts = random.Random(), list[bytes]()
    for _ in range(20):
        text = walk(bound, rng, 3_000)
        if text is not None:
            texts.append(text)
            found = Output(name, tools=schemas).parse(text.decode(errors="replace"))
            assert (found.content, found.reasoning) == ("", "") and found.calls, text
            for called, value in loaded(found):
                jsonschema.validate(value, schemas[called])
    assert texts


@pytest.mark.parametrize("name", NAMES)
def test_a_tool_need_not_name_parameters(name: str) -> None:
    envelope = TOOL_PARSERS.load(name).envelope
    for extra in ({}, {"properties": {}}, {"properties": {}, "additionalProperties": True}):
        tag = forced_calls(envelope, {"f": {"type": "object"} | extra}, None, True)
        assert walk(grammar(structural_tag={"format": tag}), random.Random(), 3_000) != b""


def test_an_answer_comes_before_the_calls_of_kimi_k3() -> None:
    for prompt in ("<|open|>think<|sep|>", "<|open|>response<|sep|>"):
        thought = REASONING_PARSERS.load("kimi_k3")(prompt, False).thought
        envelope = TOOL_PARSERS.load("kimi_k3").envelope
        text = sentences(forced_calls(envelope, {"f": SCHEMA}, thought, False))
        found = Output("kimi_k3", "kimi_k3", {"f": SCHEMA}, prompt).check_law(text)
        thinks = "think" in prompt
        assert (found.content, found.reasoning) == ("", "hm" if thinks else "")
        assert loaded(found) == [("f", VALUES)]
        assert text.count("<|open|>response<|sep|>") == thinks
        assert text.count("<|close|>response<|sep|>") == 1
        free = free_calls(envelope, "", {"f": SCHEMA}, thought, True)
        assert sentences(free).endswith("hm") if thinks else free["triggers"]


@pytest.mark.parametrize("prompt", ["<|assistant|>", "<|assistant|><think>\n"])
def test_reasoning_comes_before_forced_calls(prompt: str) -> None:
    thought = REASONING_PARSERS.load("think")(prompt, False).thought
    grammar = forced_calls(TOOL_PARSERS.load("hermes").envelope, {"f": SCHEMA}, thought, True)
    text = sentences(grammar)
    assert text.startswith("<think>") is ("<think>" not in prompt)
    found = Output("hermes", "think", {"f": SCHEMA}, prompt).check_law(text)
    assert found == Parsed("", "hm", [("f", json.dumps(VALUES))])
    first = grammar["elements"][0]["type"]
    assert first == ("tag" if "<think>" in prompt else "optional")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CHANNELS])
def test_an_opener_binds_what_follows(name: str) -> None:
    parser = TOOL_PARSERS.load(name)
    grammar = free_calls(parser.envelope, parser.openers[0], {"f": SCHEMA}, None, False)
    (trigger,) = grammar["triggers"]
    assert trigger and all(tag["begin"].startswith(trigger) for tag in grammar["tags"])
    assert not grammar["at_least_one"] and grammar["stop_after_first"]
    (tag,) = grammar["tags"]
    found = Output(name, tools={"f": SCHEMA}).parse(sentences(tag))
    assert loaded(found) == [("f", VALUES)]


def test_no_schema_is_any_object() -> None:
    envelope = TOOL_PARSERS.load("hermes").envelope
    assert envelope.tag("f", {})["content"]["json_schema"] == {"type": "object"}
