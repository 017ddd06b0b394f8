# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import stat
from pathlib import Path

from llmserve.utils.shared_page import shared_page


def test_who_maps_the_file_sees_what_others_write(tmp_path: Path) -> None:
    path = tmp_path / "page"
    one, two = (memoryview(shared_page(str(path), 16)).cast("d") for _ in range(2))
    assert list(two) == [0.0, 0.0]
    one[1] = 2.5
    assert two[1] == 2.5
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
