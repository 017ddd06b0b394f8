# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import msgspec

from llmserve.core.kv_spec import (
    AnyKVSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVGroup,
    MLASpec,
    RecurrentStateSpec,
    SlidingWindowSpec,
)

SPECS: list[AnyKVSpec] = [
    FullAttentionSpec(8, 128, 2),
    SlidingWindowSpec(8, 128, 2, 4096),
    MLASpec(512, 64, 2),
    RecurrentStateSpec(1 << 20),
]


def test_page_bytes() -> None:
    assert [spec.page_bytes(16) for spec in SPECS] == [65_536, 65_536, 18_432, 1 << 20]
    assert SPECS[3].page_bytes(64) == 1 << 20  # a state, however many tokens


def test_pool_is_all_buffers_of_all_blocks() -> None:
    groups = (KVGroup(SPECS[0], (0, 2), 16), KVGroup(SPECS[1], (1, 3), 16))
    assert KVCacheConfig(10, 65_536, 2, groups).total_bytes == 10 * 65_536 * 2


def test_kinds_survive_the_wire() -> None:
    data = msgspec.msgpack.encode(SPECS)
    assert msgspec.msgpack.decode(data, type=list[AnyKVSpec]) == SPECS
