# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The engine's whole configuration: one frozen tree, built from flat keywords."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from llmserve.config.cache import CacheConfig
from llmserve.config.device import DeviceConfig
from llmserve.config.flag import flag_name
from llmserve.config.load import LoadConfig
from llmserve.config.model import ModelConfig
from llmserve.config.scheduler import SchedulerConfig
from llmserve.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine process is started with. Never changes after `engine.resolve`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    executor: str = "uniproc"

    @classmethod
    def from_flags(cls, **flags: Any) -> "EngineConfig":
        """From flat keywords named like the flags; ConfigError for one that no group knows."""
        groups: dict[str, Any] = {}
        for group in dataclasses.fields(cls):
            if not dataclasses.is_dataclass(group.type):
                if group.name in flags:
                    groups[group.name] = flags.pop(group.name)
                continue
            names = {f.name for f in dataclasses.fields(group.type)} & flags.keys()
            groups[group.name] = group.type(**{name: flags.pop(name) for name in names})  # type: ignore[operator]
        if flags:
            name = next(iter(flags))
            known = [f.name for g in ENGINE_GROUPS for f in dataclasses.fields(g)]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {flag_name(near[0])}?" if near else ""
            raise ConfigError(f"unknown option {flag_name(name)}{hint}")
        return cls(**groups)


ENGINE_GROUPS: tuple[type, ...] = (
    ModelConfig, LoadConfig, CacheConfig, SchedulerConfig, DeviceConfig,
)  # fmt: skip
