# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The shape that a request's output must have: as the caller writes it, and as it is compiled."""

from typing import Any, Literal

import msgspec

from llmserve.errors import RequestError

GrammarKind = Literal["json", "regex", "ebnf", "lark", "structural_tag"]
GRAMMAR_ERROR = "grammar_error"  # RequestExtra.error where the request's own grammar is to blame
MAX_SPEC_BYTES = 1 << 20  # of text to compile
_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend compiles. Two specs with equal `key` are the same grammar.

    `text` of kind "json" is a JSON schema in the normal form of structured_output/schema.py.
    `param` is the field that the caller wrote it in; `ignored` are JSON pointers to keywords that
    were dropped because nobody can enforce them; `free_strings` is as has_free_strings says.
    """

    backend: str
    kind: GrammarKind
    text: str
    compact: bool = False  # JSON without any whitespace
    param: str = "structured_outputs"
    ignored: list[str] = []
    free_strings: bool = False

    @property
    def key(self) -> tuple[str, str, bool, str]:
        """What the compiled grammar depends on."""
        return self.backend, self.kind, self.compact, self.text


class StructuredOutputsParams(
    msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One of `json` (a schema), `regex`, `choice`, `grammar` (EBNF or Lark), `json_object` and
    `structural_tag`, under vLLM's names.

    `strict` refuses a schema with a keyword that nobody can enforce; else the keyword is dropped.
    `disable_additional_properties` closes every object. `param` names the field in errors.
    """

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    strict: bool = True
    param: str = "structured_outputs"

    @property
    def kind(self) -> str:
        """The one kind that is given; RequestError for none or several."""
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"{self.param}: exactly one of {', '.join(_KINDS)} must be given, "
                f"got {' and '.join(given) or 'none'}",
                param=self.param,
            )
        return given[0]
