# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Names to grammar engines."""

from llmserve.utils.registry import Registry

BACKENDS = Registry(
    "grammar backend",
    {
        "xgrammar": "llmserve.structured_output.xgrammar:XGrammarBackend",
        "guidance": "llmserve.structured_output.guidance:GuidanceBackend",
    },
)
