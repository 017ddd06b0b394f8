# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Arguments as text in tags, where xgrammar's own grammar for them is not what a parser reads.

It has no style with the tags of Step 3. It lets whitespace stand around a value that is text, which
then is part of it; and a string of bounded length may hold the text that ends it, after which the
grammar goes on and a parser does not, and takes seconds to compile. All is mended in the text of
its grammar.
"""

import re
from typing import Any

import xgrammar as xgr

from llmserve.errors import GrammarError

# A style that it does not know: one that it does, and the name of the tags in its place
_STYLES = {"step3_xml": ("minimax_xml", "steptml:parameter")}
# Texts that only look like tags are not renamed
_OPENING = re.compile(r'"<parameter(?= name=\\"([^"\\]|\\.)*" ("\\">"|xml_variable_name))')
_CLOSING = re.compile(r'(?<= "</)parameter(?=>")|(?<=excludes=\("</)parameter(?=>")')
_RAW = re.compile(r'^xml_string ::= TagDispatch\([^)]*excludes=\("<(.).*?"\)\n\)', re.MULTILINE)
_ANY = re.compile(r"^(\w+) ::= \(\(\[\\0-\\U0010ffff\]\)\)\n", re.MULTILINE)
_SPACED = re.compile(r'(?<=>") \[ \\n\\r\\t\]\* (\w+) \[ \\n\\r\\t\]\* (?="<[/|])')


def in_known_styles(part: Any) -> Any:
    """The same structural tag, or one that says more exactly what was meant."""
    if isinstance(part, list):
        return [*map(in_known_styles, part)]
    if not isinstance(part, dict):
        return part
    if part.get("type") != "json_schema":
        return {key: in_known_styles(value) for key, value in part.items()}
    if not str(part.get("style")).endswith("_xml") or part["style"] == "minimax_m3_xml":
        return part
    style, name = _STYLES.get(part["style"], (part["style"], ""))
    tag = {"type": "structural_tag", "format": part | {"style": style}}
    text = str(xgr.Grammar.from_structural_tag(tag))
    num_opening = num_closing = 0
    if name:
        text, num_opening = _OPENING.subn(f'"<{name}', text)
        text, num_closing = _CLOSING.subn(name, text)
        num_closing -= 1  # what a raw text does not hold
    if (raw := _RAW.search(text)) is None or num_opening != num_closing:
        raise GrammarError(f"xgrammar writes {style} in a way that is not known here")
    text = _SPACED.sub(r" xml_line \1 xml_line " if style == "qwen_xml" else r" \1 ", text)
    return {"type": "grammar", "grammar": _without_ends(text, raw)}


def _without_ends(text: str, raw: re.Match[str]) -> str:
    """Its strings of bounded length are as those of any length, which do not hold their end."""
    rule = raw[0].removeprefix("xml_string")
    # Of the first characters none begins the end; two count as one where that is hard to say
    first = rf'[^<] | "<" [^<{raw[1]}]'
    rules = ['xml_line ::= "\\n"?', f"xml_first ::= {first}"]

    def bounded(found: re.Match[str]) -> str:
        low, high = int(found[1]), int(found[2])
        if high < 0:
            return f"xml_first{{{low},{low}}} xml_string" if low else "xml_string"
        options: list[str] = []
        for head, most in (("[^<]", low), ("xml_first", 2 * low)):
            if most <= high and (low or not options):
                name = f"xml_string_{len(rules)}"
                rules.append(f"{name}[max_chars={high - most}]{rule}")
                options.append(f"{head}{{{low},{low}}} {name}" if low else name)
        return f"({' | '.join(options)})"

    for name in _ANY.findall(text):
        text = re.sub(rf"\b{name}{{(\d+), (-?\d+)}}", bounded, text)
    return text + "\n".join(rules) + "\n"
