# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Why a grammar engine refuses a grammar, from what its library says: one sentence for its author,
with the place where the library names one, and nothing of the library's own."""

import re

from llmserve.core.structured_outputs import GrammarKind, GrammarSpec

_MAX_CHARS = 300
_MAX_SHOWN = 40  # characters of the grammar
_NAMES: dict[GrammarKind, str] = {
    "json": "the schema", "regex": "the regular expression", "ebnf": "the grammar",
    "lark": "the grammar", "structural_tag": "the structural tag",
}  # fmt: skip
_SOURCE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")  # "[12:00:00] /a/file.cc:12: "
_CHECK = re.compile(r"^Check failed: .*? is false: (Invalid structural tag error: )?")
_PARSERS = {  # what is in front, with the place
    r"Regex parsing error at position (?P<position>\d+): ": "regex",
    r"EBNF \w+ error at line (?P<line>\d+), column (?P<column>\d+): ": "ebnf",
    r"(at )?(?P<line>\d+)\((?P<column>\d+)\): ": "lark",
}
_LINE = re.compile(r" at line (?P<line>\d+), '.*$", re.DOTALL)  # with the text around
_IN_REGEX = re.compile(r'^invalid regex ".*?" \(in regex\): ', re.DOTALL)
_CARET = re.compile(r"regex parse error:\n    (?P<text>.*)\n(?P<caret> *)\^.*\nerror: (?P<what>.*)")
_MEANT = {  # of words that only the library's author understands
    "lexer error": "it cannot be read",
    "lexer error: too many expressions constructed": "it is too large",
    "NoExtensionBias": "it allows no text",
}
MEMORY = "it needs more memory than a grammar may have"


def refusal(spec: GrammarSpec, said: str) -> str:
    """`said` is the text of the library's error."""
    text, name = _CHECK.sub("", _SOURCE.sub("", said.strip())), _NAMES[spec.kind]
    place = ""
    for pattern, kind in _PARSERS.items():
        if (found := re.match(pattern, text)) is not None:
            text = text[found.end() :]
            if kind == "regex" or spec.kind not in ("regex", "json"):  # else of what it is made to
                place = _place(found.groupdict())
            name = _NAMES["regex"] if kind == "regex" else name
    if (found := _LINE.search(text)) is not None:
        text, place = text[: found.start()], _place(found.groupdict())
    text = _IN_REGEX.sub("", text)
    if (found := _CARET.search(text)) is not None:
        text = found["what"]
        if spec.kind == "json":
            name = f"the pattern '{_shown(found['text'])}'"
        if found["text"] == spec.text or spec.kind == "json":
            place = _place({"position": str(len(found["caret"]) - 3)})
    text = text.strip().partition("\n")[0].partition("; ")[0].rstrip(".")
    text = _MEANT.get(text, text)[:_MAX_CHARS]
    if text[1:2].islower():
        text = text[0].lower() + text[1:]
    if text.endswith("but got"):
        text += " the end of it"
    if spec.kind == "regex":
        name += f" '{_shown(spec.text)}'"
    return f"{name} is not accepted: {text}{place}"


def _shown(text: str) -> str:
    return (text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...").replace("\n", "\\n")


def _place(found: dict[str, str | None]) -> str:
    where = [f"{what} {number}" for what, number in found.items() if number is not None]
    return f", at {', '.join(where)}" if where else ""
