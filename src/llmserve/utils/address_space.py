# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Whether this process and those that it starts may map what an engine maps (`ulimit -v`)."""

import resource

from llmserve.errors import ConfigError

# With 1,200,000 KiB the imports of PyTorch 2 fail, with 1,400,000 a tiny model runs.
_LEAST_BYTES = 5 << 28


def check_address_space() -> None:
    """ConfigError where an engine has no room. To be called before anything large is imported: that
    would fail in as many ways as there are libraries, and OpenBLAS never comes back."""
    room = resource.getrlimit(resource.RLIMIT_AS)[0]
    if room != resource.RLIM_INFINITY and room < _LEAST_BYTES:
        least = _LEAST_BYTES >> 10
        raise ConfigError(f"ulimit -v is {room >> 10}, and an engine needs {least} at least")
