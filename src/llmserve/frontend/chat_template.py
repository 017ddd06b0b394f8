# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Chat templates as Hugging Face defines them, in jinja2's immutable sandbox.

The environment is the documented one of `apply_chat_template`: trimmed blocks, loop controls,
`raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and the `generation` tag.
"""

import datetime
import json
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

import jinja2
from jinja2 import ext, meta, nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmserve.errors import ConfigError, RequestError

_TAG = "<|llmserve-final-message-ends-here|> "  # its last space shows whether a template trims
_PROBE = "llmserve-probe"
# A template runs in the API process's only thread: what it may take of it, and make.
_MAX_SECONDS = 1.0  # of this thread's CPU time
_MAX_CHARACTERS = 1 << 26
_DEADLINE = "llmserve_deadline"
_PROBE_ID = "llmserve0"  # some templates take ids of nine letters and digits only
# Names that template variables from a caller may not have.
RESERVED = frozenset(
    {
        "messages",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
        _DEADLINE,
    }
)
# What code inside a template may raise on messages it was not written for.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, where calls, loops and products end at the deadline or at the size."""

    intercepted_binops = frozenset({"*", "**"})

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_deadline(context[_DEADLINE])
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateRuntimeError("powers are not supported")
        for repeated, times in ((left, right), (right, left)):
            if (
                isinstance(repeated, (str, list, tuple))
                and isinstance(times, int)
                and len(repeated) * times > _MAX_CHARACTERS
            ):
                raise jinja2.TemplateRuntimeError(f"more than {_MAX_CHARACTERS} characters")
        return super().call_binop(context, operator, left, right)


def _check_deadline(deadline: float) -> None:
    if time.thread_time() > deadline:
        raise jinja2.TemplateRuntimeError(f"it ran for more than {_MAX_SECONDS:g} s")


@jinja2.pass_context
def _until_deadline(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    """What every `for` goes through, `items` one by one."""
    deadline = context[_DEADLINE]
    for item in items:
        _check_deadline(deadline)
        yield item


class _GenerationTag(ext.Extension):
    """`{% generation %}` marks the assistant's own text for training; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


class ChatTemplate:
    """One compiled template. `special_tokens` are variables in it: "bos_token" -> "<s>"."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.filters["until_deadline"] = _until_deadline
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            syntax_tree = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(syntax_tree))
            for loop in syntax_tree.find_all(nodes.For):
                loop.iter = nodes.Filter(
                    loop.iter, "until_deadline", [], [], None, None, lineno=loop.lineno
                )
            self._template = environment.from_string(syntax_tree)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is not valid: {error}") from None
        self.source = source
        self._special_tokens = special_tokens

    @cached_property
    def takes_strings(self) -> bool:
        """Whether a message's content may be a string."""
        return _PROBE in self._probe(_PROBE)

    @cached_property
    def content_format(self) -> Literal["string", "openai"]:
        """ "openai": the template goes through content parts by itself; found by trying."""
        rendered = self._probe([{"type": "text", "text": _PROBE}])
        return "openai" if _PROBE in rendered and "'type'" not in rendered else "string"

    @cached_property
    def call_form(self) -> tuple[bool, bool]:
        """How the template takes a message of tool calls alone: with a content of none instead of
        "", and with arguments as JSON text instead of an object; found by trying."""
        forms = [(none, text) for text in (False, True) for none in (False, True)]
        return next((form for form in forms if self._renders_calls(*form)), (False, False))

    def _renders_calls(self, none: bool, text: bool) -> bool:
        function = {"name": _PROBE, "arguments": '{"key": 1}' if text else {"key": 1}}
        call = {"id": _PROBE_ID, "type": "function", "function": function}
        message = {"role": "assistant", "content": None if none else "", "tool_calls": [call]}
        rendered = self._try([{"role": "user", "content": "x"}, message], False)
        return _PROBE in rendered and "key" in rendered and "'key'" not in rendered

    def _probe(self, content: Any) -> str:
        return self._try([{"role": "user", "content": content}], True)

    def _try(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self._render(messages, {"add_generation_prompt": add_generation_prompt})
        except _TEMPLATE_ERRORS:
            return ""

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt's text.

        RequestError if the template refuses the messages or there is no final one to continue.
        """
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "add_generation_prompt and continue_final_message cannot both be true",
                param="continue_final_message",
            )
        messages = [self._fitted(message) for message in messages]
        if continue_final_message:
            messages = [*messages[:-1], _tagged(messages)]
        variables = kwargs | {
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._render(messages, variables)
        except _TEMPLATE_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise RequestError(
                f"messages: the model's chat template refused them: {reason}", param="messages"
            ) from None
        return _cut_at_tag(text) if continue_final_message else text

    def _render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        variables = self._special_tokens | variables
        variables[_DEADLINE] = time.thread_time() + _MAX_SECONDS
        pieces, size = [], 0
        for piece in self._template.generate(messages=messages, **variables):
            pieces.append(piece)
            size += len(piece)
            if size > _MAX_CHARACTERS:
                raise jinja2.TemplateRuntimeError(f"more than {_MAX_CHARACTERS} characters")
        return "".join(pieces)

    def _fitted(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its content and its calls in a form that the template reads."""
        if message.get("tool_calls"):
            message = self._with_calls(message)
        content = message.get("content")
        if isinstance(content, list) and self.content_format == "string":
            return message | {"content": "\n".join(part.get("text") or "" for part in content)}
        if isinstance(content, str) and not self.takes_strings and self.content_format == "openai":
            return message | {"content": [{"type": "text", "text": content}]}
        return message

    def _with_calls(self, message: dict[str, Any]) -> dict[str, Any]:
        none, text = self.call_form
        calls = message["tool_calls"]
        if text:
            calls = [call | {"function": _with_text(call["function"])} for call in calls]
        return message | {
            "content": message.get("content") or (None if none else ""),
            "tool_calls": calls,
        }


def _with_text(function: dict[str, Any]) -> dict[str, Any]:
    return function | {"arguments": _tojson(function["arguments"])}


def read_template(template: str) -> str:
    """`template` itself, or the content of the file that it names."""
    if "{" in template or "\n" in template:
        return template
    try:
        return Path(template).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {template}: {error}") from None


def _tagged(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The last message with a tag behind its text."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        return messages[-1] | {"content": content + _TAG}
    if isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
        last = content[-1] | {"text": content[-1]["text"] + _TAG}
        return messages[-1] | {"content": [*content[:-1], last]}
    raise RequestError(
        "continue_final_message: the last message has no text to continue", param="messages"
    )


def _cut_at_tag(text: str) -> str:
    start = text.rfind(_TAG.rstrip())
    if start < 0:
        raise RequestError(
            "continue_final_message: the model's chat template leaves the last message out",
            param="continue_final_message",
        )
    trims = not text.startswith(_TAG, start)
    return text[:start].rstrip() if trims else text[:start]
