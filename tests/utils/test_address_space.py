# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import resource

import pytest

from llmserve.errors import ConfigError
from llmserve.utils.address_space import check_address_space


@pytest.mark.parametrize(
    ("kib", "fits"), [(resource.RLIM_INFINITY, True), (1_310_720, True), (1_310_719, False)]
)
def test_an_engine_has_room(kib: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    room = kib if kib == resource.RLIM_INFINITY else kib << 10
    monkeypatch.setattr(resource, "getrlimit", lambda which: (room, room))
    if fits:
        check_address_space()
        return
    with pytest.raises(ConfigError) as refused:
        check_address_space()
    assert refused.value.message == f"ulimit -v is {kib}, and an engine needs 1310720 at least"
