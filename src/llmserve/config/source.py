# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""From what the user named to local files: folder, .gguf file, hub id, or nothing (the demo)."""

import json
import os
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from llmserve.config import demo
from llmserve.config.load import LoadConfig
from llmserve.config.model import ModelConfig
from llmserve.errors import ConfigError

INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_SETTINGS = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
_SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


class Found(NamedTuple):
    """The fields of `hf.ModelSource`, in its order."""

    kind: str
    path: str
    name: str
    files: list[str]


def find_source(model: ModelConfig, load: LoadConfig) -> Found:
    """Local files of the model, downloaded if need be. ConfigError says in one line what is not
    there. With `--load-format dummy` no weights are looked for."""
    name = model.model
    if not name:
        return _gguf(demo.demo_model(), demo.NAME, load)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{name} is neither a folder nor a .gguf file")
        return _gguf(path, name, load)
    if path.is_dir():
        return _folder(path, name, load)
    if path.suffix == ".gguf" or name[0] in "./~" or name.count("/") > 1:
        raise ConfigError(f"no such file or folder: {name}")
    weights = [] if load.load_format == "dummy" else ["*.safetensors"]
    return _folder(from_hub(model, load, name, _SETTINGS + weights), name, load)


def find_tokenizer(model: ModelConfig, load: LoadConfig, name: str) -> str:
    """The folder of `--tokenizer`, which may be a hub id."""
    path = Path(name).expanduser()
    path = path if path.exists() else from_hub(model, load, name, _SETTINGS)
    if path.is_dir():
        _check_files(path)
    return str(path)


def from_hub(model: ModelConfig, load: LoadConfig, name: str, patterns: list[str]) -> Path:
    """Downloads what matches `patterns` at the top level of a hub repository, with a progress bar.

    HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured by the library.
    """
    # Imported here: it brings an HTTP client along, which a local model does without.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=model.revision,
                token=model.hf_token,
                cache_dir=load.download_dir,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except errors.HFValidationError:
        raise ConfigError(f"no such file or folder, and not a Hugging Face id: {name!r}") from None
    except errors.GatedRepoError:
        raise ConfigError(
            f"{name} is gated: accept its terms on the hub, then set HF_TOKEN or --hf-token"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{name} has no revision {model.revision!r} on the hub") from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"no folder and no Hugging Face repository named {name} "
            "(a private one needs HF_TOKEN or --hf-token)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise ConfigError(
            f"{name} is no local folder, is not in the Hugging Face cache, "
            "and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
        ) from None
    except (errors.HTTPError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"cannot download {name}: {reason}") from None


def read_json(path: Path) -> Any:
    """The file's JSON object; ConfigError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"cannot read {path}: not a JSON object")
    return value


def safetensors_header(path: str) -> dict[str, dict[str, Any]]:
    """A weight file's tensors by name: dtype, shape (counts), data_offsets. ConfigError for a file
    that is not one."""
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, info in header.items():
            if not all(type(count) is int and count >= 0 for count in info["shape"]):
                raise ValueError(f"tensor {name} has shape {info['shape']}")
        return dict(header)
    except (
        OSError, struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError,
    ) as error:  # fmt: skip
        raise ConfigError(f"{path} is not a readable safetensors file: {error}") from None


def _gguf(path: Path, name: str, load: LoadConfig) -> Found:
    if load.load_format == "safetensors":
        raise ConfigError(f"--load-format safetensors does not fit the GGUF file {path}")
    files = [path]
    if match := _SPLIT.match(path.name):
        stem, _, count = match.groups()
        files = [
            path.with_name(f"{stem}-{part:05d}-of-{count}.gguf")
            for part in range(1, int(count) + 1)
        ]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(f"{path.parent} lacks {missing[0]}, a part of {path.name}")
    return Found("gguf", str(files[0]), name, [str(file) for file in files])


def _check_files(folder: Path) -> None:
    """ConfigError for a named pipe, whose reader waits for a writer; and for a file that is a link
    out of its folder: a model that somebody else made could have any file of this machine read. The
    hub's cache links into its own repository."""
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    for file in folder.iterdir():
        if file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(root):
            raise ConfigError(f"{file} is a link to a place outside of the model's folder")
        if file.is_fifo():
            raise ConfigError(f"{file} is a named pipe")


def _folder(path: Path, name: str, load: LoadConfig) -> Found:
    _check_files(path)
    if load.load_format == "dummy":
        return Found("folder", str(path), name, [])
    ggufs = sorted(path.glob("*.gguf"))
    if load.load_format == "gguf" or (ggufs and not (path / "config.json").exists()):
        if not ggufs or (len(ggufs) > 1 and not _SPLIT.match(ggufs[0].name)):
            raise ConfigError(f"{name} has {len(ggufs)} .gguf files: name one")
        return _gguf(ggufs[0], name, load)
    if (path / INDEX).exists():
        files = _indexed(path)
    else:
        single = path / "model.safetensors"
        files = [single] if single.exists() else sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [file for kind in ("bin", "pt", "pth") for file in path.glob(f"*.{kind}")]
        why = (
            f"has only pickled weights ({pickles[0].name}), which may run code: convert them to "
            "safetensors"
            if pickles
            else "has no .safetensors weights"
        )
        raise ConfigError(f"{name} {why}")
    return Found("folder", str(path), name, [str(file) for file in files])


def _indexed(path: Path) -> list[Path]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{path / INDEX} has no weight_map")
    names = sorted({str(file) for file in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{path / INDEX} names a file outside its folder: {name!r}")
        if not (path / name).is_file():
            raise ConfigError(f"{path} lacks {name}, which {INDEX} names")
    return [path / name for name in names]
