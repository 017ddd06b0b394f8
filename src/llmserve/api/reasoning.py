# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""How much a chat request wants the model to think, in the words of its chat template."""

from typing import Any

from llmserve.api.errors import invalid_value


def effort_kwargs(
    effort: str | None,
    given: dict[str, Any],
    variables: frozenset[str],
    efforts: tuple[str, ...] | None,
) -> dict[str, Any]:
    """Template variables for `reasoning_effort` as far as the template reads them; those that the
    client has `given` itself stay. RequestError for a level that is none of the model's."""
    if effort is None:
        return {}
    if efforts is not None and effort not in efforts:
        raise invalid_value(
            "reasoning_effort",
            f"this model's levels are {', '.join(efforts)}",
            "unsupported_value",
        )
    thinks = effort != "none"
    values = {"reasoning_effort": effort, "enable_thinking": thinks, "thinking": thinks}
    return {
        name: value for name, value in values.items() if name in variables and name not in given
    }
