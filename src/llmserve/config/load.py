# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Where weights come from."""

from dataclasses import dataclass

from llmserve.config.flag import check_all, flag


@dataclass(frozen=True)
class LoadConfig:
    """Weight loading."""

    load_format: str = flag(
        "auto",
        "auto takes what is there; dummy fills uniform +-1e-3 weights.",
        choices=("auto", "safetensors", "gguf", "dummy"),
    )
    download_dir: str | None = flag(
        None, "Where hub downloads go; default is the Hugging Face cache."
    )

    def __post_init__(self) -> None:
        check_all(self)
