# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Folders, files and a fake hub; the hub's client reads its settings at import, so in a child."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmserve.config import demo
from llmserve.config.load import LoadConfig
from llmserve.config.model import ModelConfig
from llmserve.config.source import INDEX, Found, find_source
from llmserve.errors import ConfigError
from tests.helpers.fake_hub import FakeHub, serve

CHILD = """
import json, sys
from llmserve.config.load import LoadConfig
from llmserve.config.model import ModelConfig
from llmserve.config.source import find_source
from llmserve.errors import ConfigError
flags, load = json.loads(sys.argv[1])
try:
    print(json.dumps(find_source(ModelConfig(**flags), LoadConfig(**load))))
except ConfigError as error:
    print(json.dumps(str(error)))
"""


def find(name: Path | str, load_format: str = "auto") -> Found:
    return find_source(ModelConfig(model=str(name)), LoadConfig(load_format=load_format))


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def test_single_file_wins_over_other_safetensors(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "model.safetensors", "consolidated.safetensors")
    assert find(tmp_path).files == [str(tmp_path / "model.safetensors")]


def test_sharded_by_its_index(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "b.safetensors", "a.safetensors", "unrelated.safetensors")
    names = {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    assert find(tmp_path).files == [str(tmp_path / f"{n}.safetensors") for n in "ab"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_named_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "config.json", "tokenizer.json", "model.safetensors")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name} is a named pipe"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ({"weight_map": {"x": "c.safetensors"}}, "lacks c.safetensors"),
        ({"weight_map": {"x": "../a.safetensors"}}, "outside its folder"),
        ({"weight_map": {"x": "/etc/passwd"}}, "outside its folder"),
        ({"weight_map": []}, "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
def test_bad_index(tmp_path: Path, index: dict[str, Any], complaint: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    touch(tmp_path, "a.safetensors")
    touch(folder, "config.json", "a.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=complaint):
        find(folder)


def test_pickles_are_never_taken(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only pickled weights .pytorch_model.bin."):
        find(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    touch(tmp_path, "config.json")
    with pytest.raises(ConfigError, match="no .safetensors weights"):
        find(tmp_path)
    assert find(tmp_path, "dummy").files == []


def test_a_link_to_itself_is_left_to_who_reads_it(tmp_path: Path) -> None:
    touch(tmp_path, "config.json")
    path = tmp_path / "model.safetensors"
    path.symlink_to(path.name)
    assert find(tmp_path).files == [str(path)]


def test_any_part_of_a_split_gguf_finds_the_first(tmp_path: Path) -> None:
    names = [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    touch(tmp_path, *names)
    found = find(tmp_path / names[1])
    assert found.path == str(tmp_path / names[0])
    assert found.files == [str(tmp_path / name) for name in names]
    (tmp_path / names[2]).unlink()
    with pytest.raises(ConfigError, match="lacks m-00003-of-00003.gguf"):
        find(tmp_path / names[0])


def test_folder_of_one_gguf(tmp_path: Path) -> None:
    touch(tmp_path, "m.gguf")
    assert find(tmp_path) == Found(
        "gguf", str(tmp_path / "m.gguf"), str(tmp_path), [str(tmp_path / "m.gguf")]
    )
    touch(tmp_path, "n.gguf")
    with pytest.raises(ConfigError, match="2 .gguf files: name one"):
        find(tmp_path)


def test_load_format_must_fit(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "m.gguf", "model.safetensors")
    assert find(tmp_path).kind == "folder"
    assert find(tmp_path, "gguf").kind == "gguf"
    with pytest.raises(ConfigError, match="does not fit the GGUF file"):
        find(tmp_path / "m.gguf", "safetensors")


@pytest.mark.parametrize(
    "name", ["/no/where", "./nowhere", "~/nowhere-at-all", "nowhere.gguf", "a/b/c"]
)
def test_missing_paths_never_reach_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        find(name)


def test_some_other_file(tmp_path: Path) -> None:
    touch(tmp_path, "model.onnx")
    with pytest.raises(ConfigError, match="neither a folder nor a .gguf"):
        find(tmp_path / "model.onnx")


def test_nothing_named_is_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, demo.FILE)
    monkeypatch.setattr(demo, "demo_model", lambda: tmp_path / demo.FILE)
    assert find("").name == "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    touch(folder, "model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "run.py")
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[FakeHub]:
    with serve(FakeHub("org/name", repository)) as hub:
        yield hub


def child(
    hub: FakeHub, home: Path, name: str = "org/name", env: dict[str, str] | None = None,
    load: dict[str, str] | None = None, **flags: str,
) -> Any:  # fmt: skip
    """find_source in a process of its own."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([{"model": name} | flags, load or {}])],
        env=os.environ | settings | (env or {}),
        cwd=Path(__file__).parents[2] / "src",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_hub_download_takes_what_is_needed_and_works_offline_after(
    hub: FakeHub, tmp_path: Path
) -> None:
    kind, path, name, files = child(hub, tmp_path)
    assert kind == "folder" and name == "org/name" and path.startswith(str(tmp_path))
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert files == [f"{path}/model.safetensors"]
    asked = len(hub.asked)
    again = child(hub, tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert again == [kind, path, name, files] and len(hub.asked) == asked


def test_download_dir_and_dummy_weights(hub: FakeHub, tmp_path: Path) -> None:
    load = {"download_dir": str(tmp_path / "elsewhere"), "load_format": "dummy"}
    _, path, _, files = child(hub, tmp_path / "home", load=load)
    assert path.startswith(str(tmp_path / "elsewhere")) and files == []
    assert sorted(os.listdir(path)) == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    ("name", "flags", "env", "complaint"),
    [
        ("org/other", {}, {}, "no Hugging Face repository named org/other"),
        ("org/name", {"revision": "v9"}, {}, "org/name has no revision 'v9'"),
        ("org/name", {}, {"HF_HUB_OFFLINE": "1"}, "not in the Hugging Face cache"),
        ("bad name!", {}, {}, "not a Hugging Face id: 'bad name!'"),
    ],
)
def test_hub_errors_are_one_line(
    hub: FakeHub, tmp_path: Path, name: str, flags: dict[str, str], env: dict[str, str],
    complaint: str,
) -> None:  # fmt: skip
    message = child(hub, tmp_path, name, env, **flags)
    assert complaint in message and "\n" not in message


def test_gated_repository_needs_the_token(repository: Path, tmp_path: Path) -> None:
    with serve(FakeHub("org/name", repository, token="hf_secret")) as hub:
        assert "org/name is gated" in child(hub, tmp_path / "a", env={"HF_TOKEN": "hf_wrong"})
        assert child(hub, tmp_path / "b", env={"HF_TOKEN": "hf_secret"})[0] == "folder"
        assert child(hub, tmp_path / "c", hf_token="hf_secret")[0] == "folder"
