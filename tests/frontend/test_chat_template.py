# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Chat templates against transformers' own rendering."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llmserve.config.demo import demo_model
from llmserve.config.gguf import read_header
from llmserve.errors import ConfigError, RequestError
from llmserve.frontend import chat_template
from llmserve.frontend.chat_template import ChatTemplate, read_template
from tests.helpers.clock import in_time

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    [{{ message.role }}] {{ message.content | trim }}{{ eos_token }}
    {% generation %}<{{ loop.index }}>{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}
"""
PARTS = """{% for message in messages %}<{{ message['role'] }}>
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}{% for part in message['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}
{%- endif %}
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
ONLY_PARTS = """{% for message in messages %}<{{ message.role }}>
{%- for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"""
TOOLS = """{% for tool in tools or [] %}{{ tool | tojson }}
{{ tool | tojson(indent=2) }}
{% endfor %}{% set ns = namespace(n=0) %}{% for message in messages %}
{%- set ns.n = ns.n + 1 %}{{ message.content }}{% endfor %}{{ ns.n }}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"""

CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "  <b>1 & 2</b>\n日本 \n"},
    {"role": "assistant", "content": "Fine, "},
]
TOOL = {"name": "f", "description": "a < b & 'c' é", "parameters": {"b": 1, "a": [True, None]}}


def reference(source: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    texts = render_jinja_template([messages], chat_template=source, **(SPECIAL | kwargs))[0]
    return str(texts[0])


def render(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    return template.render(messages, add_generation_prompt=False, continue_final_message=False)


@pytest.mark.parametrize("source", [CHATML, TRIMMING, PARTS, TOOLS])
@pytest.mark.parametrize("generation", [False, True])
def test_renders_as_transformers_does(source: str, generation: bool) -> None:
    template = ChatTemplate(source, SPECIAL)
    for messages in (CHAT, CHAT[1:], CHAT[1:2]):
        for extra in ({}, {"tools": [TOOL], "enable_thinking": False}):
            got = template.render(
                messages, add_generation_prompt=generation, continue_final_message=False, **extra
            )
            assert got == reference(source, messages, add_generation_prompt=generation, **extra)


def test_demo_models_template() -> None:
    source = read_header([str(demo_model())]).metadata["tokenizer.chat_template"]
    template = ChatTemplate(source, {})
    assert template.content_format == "string" and template.takes_strings
    for messages in (CHAT, CHAT[1:2]):
        got = template.render(messages, add_generation_prompt=True, continue_final_message=False)
        assert got == reference(source, messages, add_generation_prompt=True)


@pytest.mark.parametrize("source", [CHATML, TRIMMING, PARTS])
def test_continues_the_final_message_as_transformers_does(source: str) -> None:
    template = ChatTemplate(source, SPECIAL)
    for final in ("Fine, ", "Fine,", "a\n", "x Fine, </s> Fine, "):
        messages = [*CHAT[:2], {"role": "assistant", "content": final}]
        got = template.render(messages, add_generation_prompt=False, continue_final_message=True)
        assert got == reference(source, messages, continue_final_message=True)
        assert got.endswith(final) or got.endswith(final.rstrip())


def test_continues_the_last_text_part() -> None:
    template = ChatTemplate(PARTS, SPECIAL)
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two "}]
    got = template.render(
        [{"role": "assistant", "content": parts}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert got == "<assistant>one two "


def test_what_cannot_be_continued() -> None:
    silent = ChatTemplate("{{ messages | length }}", {})
    for template, messages in (
        (silent, CHAT),
        (ChatTemplate(CHATML, {}), []),
        (ChatTemplate(CHATML, {}), [{"role": "assistant", "content": None}]),
    ):
        with pytest.raises(RequestError, match="continue_final_message"):
            template.render(messages, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(RequestError, match="cannot both"):
        silent.render(CHAT, add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize(
    ("source", "content_format", "takes_strings"),
    [
        (CHATML, "string", True),
        (TRIMMING, "string", True),
        (PARTS, "openai", True),
        (ONLY_PARTS, "openai", False),
        ("{{ raise_exception('never') }}", "string", False),
    ],
)
def test_content_format(source: str, content_format: str, takes_strings: bool) -> None:
    template = ChatTemplate(source, SPECIAL)
    assert (template.content_format, template.takes_strings) == (content_format, takes_strings)


def test_content_is_given_in_the_form_the_template_reads() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    def render(source: str, content: Any) -> str:
        return ChatTemplate(source, {}).render(
            [{"role": "user", "content": content}],
            add_generation_prompt=False,
            continue_final_message=False,
        )

    assert render(TRIMMING, parts).strip().startswith("[user] a\nb")
    assert render(PARTS, parts) == "<user>ab"
    assert render(ONLY_PARTS, "a b") == "<user>a b"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% set _ = messages.append(1) %}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(999999) %}{% endfor %}",
    ],
)
def test_what_a_template_refuses_or_may_not_do(source: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(RequestError) as caught:
        template.render(CHAT, add_generation_prompt=True, continue_final_message=False)
    assert (caught.value.param, caught.value.status) == ("messages", 400)
    if "alternate" in source:
        assert "roles must alternate" in str(caught.value)


def test_variables_time_and_syntax() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }} {{ foo }} {{ bos_token }}", SPECIAL)
    assert {"foo", "bos_token"} <= template.variables
    text = template.render([], add_generation_prompt=False, continue_final_message=False, foo="x")
    assert re.fullmatch(r"20\d\d x <s>", text)
    with pytest.raises(ConfigError, match="not valid"):
        ChatTemplate("{% if %}", {})


def test_template_from_file_or_text(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ 1 }}")
    assert read_template(str(file)) == read_template("{{ 1 }}") == "{{ 1 }}"
    with pytest.raises(ConfigError, match="nowhere"):
        read_template(str(tmp_path / "nowhere"))


MANY = "{% for i in range(99999) %}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (f"{MANY}{MANY}{{% endfor %}}{{% endfor %}}", "ran for more than"),
        (f"{{% set n = range(99999) | list %}}{MANY}{{% for j in n %}}{{% endfor %}}{{% endfor %}}",
         "ran for more than"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
         "ran for more than"),
        (f"{MANY}{{{{ messages[0].content }}}}{{% endfor %}}", "characters"),
        ("{{ messages[0].content * 999999999 }}", "characters"),
        ("{{ 999999999 * messages[0].content }}", "characters"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "powers"),
    ],
)  # fmt: skip
def test_a_render_has_an_end(monkeypatch: pytest.MonkeyPatch, source: str, reason: str) -> None:
    """Loops, recursion, output and single operations; the messages of others go through."""
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 0.05)
    guard = "{% if messages[0].role == 'tool' %}" + source + "{% endif %}ok"
    template = ChatTemplate(guard, SPECIAL)
    messages = [{"role": "tool", "content": "x" * 10_000}]
    start = time.thread_time()
    with pytest.raises(RequestError, match=reason):
        render(template, messages)
    in_time(time.thread_time() - start, 0.5)
    assert render(template, [{"role": "user", "content": "x"}]) == "ok"


def test_loop_variables_count_as_they_do_without_a_deadline() -> None:
    source = (
        "{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}"
        "{{ loop.revindex }}{{ loop.first }}{{ loop.last }}"
        "{{ loop.previtem is defined }}{{ loop.nextitem is defined }}{{ 3 * 'ab' }}"
        "{% else %}none{% endfor %}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}"
        "{% for x in [1, [2]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}"
    )
    template = ChatTemplate(source, SPECIAL)
    for messages in (CHAT, CHAT[:1]):
        assert render(template, messages) == reference(source, messages)


CALLS = [
    {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
]


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("{{ c.function.name }}{{ c.function.arguments | tojson }}", (False, False)),
        ("{{ c.function.name + c.function.arguments }}", (False, True)),
        (
            "{% if m.content is none %}{{ c.function.name + c.function.arguments }}{% endif %}",
            (True, True),
        ),
        ("{{ c.function.name }}{{ c.function.arguments }}", (False, True)),
        ("", (False, False)),
    ],
)  # fmt: skip
def test_calls_in_the_form_that_the_template_takes(source: str, form: tuple[bool, bool]) -> None:
    body = "{% for c in m.tool_calls or [] %}" + source + "{% endfor %}"
    template = ChatTemplate("{% for m in messages %}[" + body + "]{% endfor %}", {})
    assert template.call_form == form
    messages = [{"role": "assistant", "content": "", "tool_calls": CALLS}]
    text = template.render(messages, add_generation_prompt=False, continue_final_message=False)
    assert text == ('[f{"a": "é"}]' if source else "[]")
    assert CALLS[0]["function"]["arguments"] == {"a": "é"}
