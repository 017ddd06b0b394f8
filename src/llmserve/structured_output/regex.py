# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Regular expressions as JSON schema and most callers mean them: \\d and \\w are ASCII."""

import re

_ASCII = {"d": "0-9", "w": "A-Za-z0-9_", "D": "^0-9", "W": "^A-Za-z0-9_"}
_NOT_REGULAR = re.compile(
    r"\[(?:\\.|[^\]\\])*\]?|(?P<around>\(\?<?[=!]|\\[bB])|(?P<back>\\(?:[1-9]|k<))|\\.", re.DOTALL
)


def not_regular(pattern: str) -> str | None:
    """What is in the pattern that no grammar engine can enforce."""
    for found in _NOT_REGULAR.finditer(pattern):
        for name, what in (("around", "look-around"), ("back", "a back reference")):
            if found[name]:
                return f"{what} at position {found.start() + 1}"
    return None


def ascii_classes(pattern: str) -> str:
    """Writes out the classes that grammar engines extend to all of Unicode.

    Inside brackets a negated one is left as it is: there it would have to be subtracted.
    """
    out: list[str] = []
    in_brackets, i = False, 0
    while i < len(pattern):
        char = pattern[i]
        if char == "\\" and i + 1 < len(pattern):
            letter = pattern[i + 1]
            inner = _ASCII.get(letter)
            if inner is None or (in_brackets and letter in "DW"):
                out.append(char + letter)
            else:
                out.append(inner if in_brackets else f"[{inner}]")
            i += 2
            continue
        if char == "[" and not in_brackets:
            in_brackets = True
        elif char == "]":
            in_brackets = False
        out.append(char)
        i += 1
    return "".join(out)
