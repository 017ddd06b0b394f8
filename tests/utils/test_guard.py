# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The per-request guard."""

from typing import NoReturn

import pytest

from llmserve.errors import ConfigError
from llmserve.utils.guard import guarded


def fail() -> int:
    raise ZeroDivisionError("boom")


def refuse(error: Exception) -> NoReturn:
    raise ConfigError(f"refused: {error}")


def test_guarded() -> None:
    assert guarded(lambda: 5, lambda error: 6) == 5
    assert guarded(fail, lambda error: len(str(error))) == 4
    with pytest.raises(ConfigError, match="refused: boom"):
        guarded(fail, refuse)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_passes(kind: type[BaseException]) -> None:
    def end() -> int:
        raise kind

    with pytest.raises(kind):
        guarded(end, lambda error: 0)
