# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Documents that a schema may refer to though it does not hold them: JSON schema's own schemas."""

import json
from functools import cache
from importlib.metadata import files
from typing import Any

_HOSTS = ("http://json-schema.org/", "https://json-schema.org/")


def known_document(uri: str) -> Any:
    """The metaschema or vocabulary at `uri`, without its fragment; None if it is not one."""
    return _metaschemas().get(uri) if uri.startswith(_HOSTS) else None


@cache
def _metaschemas() -> dict[str, Any]:
    # Read without an import: the package's own code builds a registry that nobody asks for
    found = {}
    for path in files("jsonschema-specifications") or ():
        if "schemas" in path.parts and not path.name.startswith("."):
            schema = json.loads(path.read_text("utf-8"))
            found[str(schema.get("$id") or schema.get("id")).rstrip("#")] = schema
    return found
