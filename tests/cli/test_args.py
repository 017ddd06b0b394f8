# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmserve.cli import args
from llmserve.cli.args import Option, options_of, parse_flags
from llmserve.config.engine import ENGINE_GROUPS, EngineConfig
from llmserve.config.flag import flag
from llmserve.config.server import ServerConfig
from llmserve.errors import ConfigError

GROUPS = (*ENGINE_GROUPS, ServerConfig)
OPTIONS = options_of(GROUPS)


def parse(*argv: str) -> dict[str, Any]:
    return parse_flags(argv, GROUPS, prog="llmserve serve")


def other_value(option: Option) -> tuple[list[str], Any]:
    """Words for `option` and the value they mean, which is not its default."""
    if option.info.choices:
        choice = next((c for c in option.info.choices if c != option.default), option.default)
        return [choice], choice
    if option.type is bool:
        return [], not option.default
    if option.name == "structured_outputs_config":
        return ['{"backend": "guidance"}'], {"backend": "guidance"}
    if option.name == "override_generation_config":
        return ['{"top_k": 3}'], {"top_k": 3}
    if option.is_json:
        return ['{"a": {"b": 1}}'], {"a": {"b": 1}}
    if option.info.repeat:
        return (["3", "5"], [3, 5]) if option.word_type is int else (["one", "two"],) * 2
    if option.name == "block_size":
        return ["32"], 32
    if option.type is int:
        return ["7"], 7
    if option.type is float:
        return ["0.5"], 0.5
    return ["some/text"], "some/text"


def build(flags: dict[str, Any]) -> list[object]:
    server = {name: flags.pop(name) for name in list(flags) if OPTIONS[name].group is ServerConfig}
    engine = EngineConfig.from_flags(**flags)
    return [engine.model, engine.load, engine.cache, engine.scheduler, engine.device,
            ServerConfig(**server)]  # fmt: skip


@pytest.mark.parametrize("spelling", ["dash", "underscore", "equals"])
@pytest.mark.parametrize("name", OPTIONS)
def test_value_arrives_in_its_field(name: str, spelling: str) -> None:
    option = OPTIONS[name]
    words, value = other_value(option)
    word = option.flag
    if option.type is bool and not value:
        word = "--no-" + option.flag[2:]
    if spelling == "underscore":
        word = "--" + word[2:].replace("-", "_")
    if spelling == "equals" and words:
        argv = [f"{word}={each}" for each in words]
    else:
        argv = [word, *words]
    default, changed = build({}), build(parse(*argv))
    for before, after in zip(default, changed, strict=True):
        for field in dataclasses.fields(before):  # type: ignore[arg-type]
            mine = isinstance(after, option.group) and field.name == name
            wanted = value if mine else getattr(before, field.name)
            assert getattr(after, field.name) == wanted, field.name


def test_switches_have_both_forms() -> None:
    assert parse("--enable-prefix-caching") == {"enable_prefix_caching": True}
    assert parse("--no-enable-prefix-caching") == {"enable_prefix_caching": False}
    assert parse("--no_enable_prefix_caching", "--enable-prefix-caching") == {
        "enable_prefix_caching": True
    }
    with pytest.raises(ConfigError, match="--port is not a switch"):
        parse("--no-port")


@pytest.mark.parametrize(
    ("words", "value"), [("16k", 16_000), ("16K", 16_384), ("4096", 4096), ("auto", -1)]
)
def test_sizes(words: str, value: int) -> None:
    assert parse("--max-model-len", words) == {"max_model_len": value}


def test_short_form_and_model() -> None:
    assert parse("some/model", "-tp", "1") == {"model": "some/model", "tensor_parallel_size": 1}
    assert parse("--port", "1", "m") == {"model": "m", "port": 1}
    assert parse("m", "--model", "m") == {"model": "m"}
    with pytest.raises(ConfigError, match="given twice"):
        parse("m", "--model", "other")


def test_repeated_flag_collects() -> None:
    flags = parse("m", "--api-key", "a", "b", "--api-key", "c", "--port", "5")
    assert flags["api_key"] == ["a", "b", "c"]


def test_json_and_its_parts() -> None:
    flags = parse(
        "--hf-overrides", '{"a": 1, "rope": {"x": 1}}',
        "--hf-overrides.rope.y", "2.5", "--hf_overrides.name=text",
    )  # fmt: skip
    assert flags == {"hf_overrides": {"a": 1, "rope": {"x": 1, "y": 2.5}, "name": "text"}}
    flags = parse("--structured-outputs-config.backend", "guidance")
    assert flags == {"structured_outputs_config": {"backend": "guidance"}}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "x"], "--port must be a whole number, got 'x'"),
        (["--gpu-memory-utilization", "x"], "--gpu-memory-utilization must be a number"),
        (["--hf-overrides", "[1]"], "--hf-overrides must be a JSON object"),
        (["--hf-overrides", "{"], "--hf-overrides must be a JSON object"),
        (["--max-num-seqs", "many"], "--max-num-seqs: not a size: 'many'"),
        (["--port.x", "1"], "--port has no parts"),
        (["--hf-overrides.a", "1", "--hf-overrides.a.b", "2"], "a already has a value, 1"),
        (["--enforce-eager=false"], "is a switch and takes no value, got 'false'"),
        (["--port"], "argument --port: expected one argument"),
        (["--max-num-sequences", "1"], "unknown option --max-num-sequences; did you mean --max-"),
        (["--no-enable-prefix-cache"], "did you mean --no-enable-prefix-caching"),
        (["--tensor-paralel", "1"], "did you mean --tensor-parallel-size"),
        (["--enable-loras"], r"did you mean --enable-lora \(not supported yet\)"),
        (["--enable-lora"], "--enable-lora is not supported yet"),
        (["--no-enable-lora"], "--no-enable-lora is not supported yet"),
        (["--speculative_config", "{}"], "--speculative-config is not supported yet"),
        (["--compilation-config.cudagraph_mode", "FULL"], "--compilation-config is not supported"),
        (["-pp", "2"], "-pp is not supported yet"),
        (["-O3"], "-O3 is not supported yet"),
        (["m", "-zz"], "unrecognized arguments: -zz"),
        (["m", "n"], "unrecognized arguments: n"),
        (["--task", "embed"], "--task embed is not supported yet"),
        (["--swap-space"], "--swap-space needs a value"),
        (["--config"], "--config needs a value"),
        (["--help=nonsense"], "no such group or flag"),
    ],
)
def test_refusals_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse(*argv)
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    "argv",
    [
        ["--swap-space", "4"], ["--swap_space=4"], ["--disable-log-requests"], ["--task", "auto"],
        ["--guided-decoding-backend", "outlines"], ["--max-seq-len-to-capture", "8192"],
        ["--enable-reasoning"], ["--num-scheduler-steps", "8"], ["--use-v2-block-manager"],
    ],
)  # fmt: skip
def test_old_names_are_accepted_and_said_to_be_old(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse("m", *argv, "--port", "5") == {"model": "m", "port": 5}
    name = argv[0].replace("_", "-").partition("=")[0]
    assert f"{name} is an old name" in capsys.readouterr().err


def test_foreign_flags_are_not_ours() -> None:
    foreign = args._foreign()
    names = [*foreign["old"], *(flag for flags in foreign["later"].values() for flag in flags)]
    assert len(names) == len(set(names)) > 100
    assert not {name.replace("-", "_") for name in names} & OPTIONS.keys()


def test_yaml_gives_what_the_command_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "model: from/yaml\nport: 7000\nmax_model_len: 16k\nenable-prefix-caching: false\n"
        "api-key: [a, b]\nhf-overrides: {a: {b: 1}}\nrevision: null\nseed: -3\n"
    )
    flags = parse("from/cli", "--config", str(path), "--port", "7001", "--api-key", "c")
    assert flags == {
        "model": "from/cli", "port": 7001, "max_model_len": 16000, "enable_prefix_caching": False,
        "api_key": ["c"], "hf_overrides": {"a": {"b": 1}}, "seed": -3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown option --prot; did you mean --port"),
        ("- a", "must be a mapping"),
        ("a: [", "while parsing"),
        ("enable-lora: true", "--enable-lora is not supported yet"),
        ("port: x", "--port must be a whole number"),
    ],
)
def test_yaml_errors_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        parse("--config", str(path))
    assert raised.value.message.startswith(f"--config {path}: ")
    assert "\n" not in raised.value.message
    with pytest.raises(ConfigError, match="No such file"):
        parse("--config", str(tmp_path / "none.yaml"))


def help_text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_pages(capsys: pytest.CaptureFixture[str]) -> None:
    everything = help_text(capsys, "--help=all")
    assert all(option.flag in everything for option in OPTIONS.values())
    short = help_text(capsys, "--help")
    assert all(option.flag in short for option in OPTIONS.values())
    assert "Most requests in one step." not in short
    group = help_text(capsys, "--help=SchedulerConfig")
    assert "--max-num-seqs" in group and "--port" not in group
    one = help_text(capsys, "--help=max-model-len")
    assert "Context length" in one and "--max-num-seqs" not in one
    assert "default: 16" in help_text(capsys, "--help=block_size")


def test_other_commands_know_nothing_of_vllm() -> None:
    @dataclass(frozen=True)
    class Own:
        """Own."""

        task: str = flag("", "A task.")

    assert parse_flags(["--task", "x"], (Own,), prog="p", model_tag=False) == {"task": "x"}
    with pytest.raises(ConfigError, match="unknown option --enable-lora"):
        parse_flags(["--enable-lora"], (Own,), prog="p", model_tag=False, vllm=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"max-num-seqs: [1, 2]", "--max-num-seqs takes one value, got [1, 2]"),
        (b"tokenizer: {a: 1}", "--tokenizer takes one value, got {'a': 1}"),
        (b"enforce-eager: 3", "--enforce-eager is a switch and takes no value, got '3'"),
        (b"config: other.yaml", "--config belongs on the command line"),
        (b"help: all", "--help belongs on the command line"),
        (b"model: \xff", "can't decode byte 0xff"),
        (b"api-key: [0123]", "--api-key must be text, got 83; put it in quotes"),
        (b"api-key: [a, ~]", "--api-key must be text, got None; put it in quotes"),
        (b"tokenizer: off", "--tokenizer must be text, got False; put it in quotes"),
        (b"hf-overrides: {a: 2020-01-01}", "--hf-overrides must be a JSON object: "),
        (b"hf-overrides: &x {a: *x}", "--hf-overrides must be a JSON object: Circular"),
        (b"hf-overrides: " + b"{a: " * 3000 + b"1" + b"}" * 3000, "recursion"),
    ],
    ids=[
        "list",
        "object",
        "switch",
        "config",
        "help",
        "utf8",
        "octal",
        "null",
        "off",
        "date",
        "circular",
        "deep",
    ],
)
def test_yaml_values_of_another_kind_are_one_line(
    tmp_path: Path, text: bytes, message: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(path))
    assert caught.value.message.startswith(f"--config {path}: ")
    assert message in caught.value.message and "\n" not in caught.value.message
