# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Command lines and YAML files to flat keywords, from the `flag` fields of dataclasses.

`--a-b` and `--a_b` are the same; switches also have `--no-a-b`; JSON flags also take single keys,
`--hf-overrides.rope_parameters.factor 2`; `--config file.yaml` gives flags that the command line
overrides. Values are checked when their config group is built, so that YAML, Python and the command
line are refused alike.
"""

import argparse
import dataclasses
import difflib
import json
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llmserve.config.flag import FlagInfo, flag_name
from llmserve.errors import ConfigError

_FOREIGN = Path(__file__).with_name("foreign_flags.toml")
_G = typing.TypeVar("_G")


@dataclasses.dataclass(frozen=True)
class Option:
    """One flag: its field, its plain type (`None` taken out of unions) and its FlagInfo."""

    name: str
    group: type
    type: Any
    default: Any
    info: FlagInfo

    @property
    def flag(self) -> str:
        """`--max-num-seqs`."""
        return flag_name(self.name)

    @property
    def is_json(self) -> bool:
        """Whether the value is a JSON object."""
        return typing.get_origin(self.type) is dict

    @property
    def word_type(self) -> type:
        """What one word is: an element of a list, else the value."""
        return typing.get_args(self.type)[0] if self.info.repeat else self.type

    def convert(self, word: str) -> Any:
        """The value that one word means; ConfigError names the flag."""
        try:
            if self.info.parse:
                return self.info.parse(word)
            if self.is_json:
                value = json.loads(word)
                if not isinstance(value, dict):
                    raise ValueError
                return value
            return self.word_type(word) if self.word_type in (int, float) else word
        except ConfigError as error:
            raise ConfigError(f"{self.flag}: {error.message}") from None
        except ValueError:
            kind = {int: "a whole number", float: "a number"}.get(self.word_type, "a JSON object")
            raise ConfigError(f"{self.flag} must be {kind}, got {word!r}") from None


def options_of(groups: Sequence[type]) -> dict[str, Option]:
    """The flags of dataclasses by field name; a name may stand in one group only."""
    options: dict[str, Option] = {}
    for group in groups:
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            info = field.metadata.get("flag")
            if info is None:
                continue
            kind = hints[field.name]
            if typing.get_origin(kind) in (types.UnionType, typing.Union):
                (kind,) = (arm for arm in typing.get_args(kind) if arm is not types.NoneType)
            default = (
                field.default_factory()
                if field.default_factory is not dataclasses.MISSING
                else field.default
            )
            assert field.name not in options, field.name
            options[field.name] = Option(field.name, group, kind, default, info)
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser(
    prog: str, description: str, groups: Sequence[type], options: Mapping[str, Option], *, tag: bool
) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog, description=description, allow_abbrev=False, add_help=False,
        usage=f"{prog}{' [MODEL]' if tag else ''} [options]",
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
    )  # fmt: skip
    if tag:
        parser.add_argument("model_tag", nargs="?", help=argparse.SUPPRESS)
    for group in groups:
        section = parser.add_argument_group(
            group.__name__, (group.__doc__ or "").strip().partition("\n")[0]
        )
        for option in options.values():
            if option.group is not group:
                continue
            names = [option.flag] + ([option.info.short] if option.info.short else [])
            keywords: dict[str, Any] = {"dest": option.name, "help": _help(option)}
            if option.type is bool:
                keywords["action"] = argparse.BooleanOptionalAction
            else:
                keywords |= {"type": option.convert, "metavar": _metavar(option)}
            if option.info.repeat:
                keywords |= {"nargs": "+", "action": "extend"}
            section.add_argument(*names, **keywords)
    return parser


def _metavar(option: Option) -> str:
    if option.info.choices:
        return "{" + ",".join(option.info.choices) + "}"
    if option.is_json:
        return "JSON"
    return "N" if option.type in (int, float) else option.name.rpartition("_")[2].upper()


def _help(option: Option) -> str:
    text = option.info.help.replace("%", "%%")
    if option.default in (None, "", [], {}):
        return text
    default = {True: "on", False: "off"}[option.default] if option.type is bool else option.default
    return f"{text} (default: {default})"


class _Line:
    """One command line on its way to argparse: names made canonical, foreign ones dealt with."""

    def __init__(self, options: Mapping[str, Option], words: Sequence[str], vllm: bool) -> None:
        self._options = options
        self._vllm = vllm
        self._rest = list(words)
        self.words: list[str] = []
        self.dotted: dict[str, Any] = {}
        self.config: str | None = None
        self.help: str | None = None
        while self._rest:
            word = self._rest.pop(0)
            if word == "--":
                self.words += [word, *self._rest]
                break
            if word in ("-h", "--help"):
                self.help = ""
            elif word.startswith("--"):
                self._long(word)
            else:
                if self._vllm and word.startswith("-") and word[1:2].isalpha():
                    self._short(word)
                self.words.append(word)

    def _long(self, word: str) -> None:
        name, equals, value = word[2:].partition("=")
        head, dot, path = name.partition(".")
        key = head.replace("-", "_")
        option = self._options.get(key)
        if key == "help":
            self.help = value
        elif key == "config" and "config" not in self._options:
            self.config = value if equals else self._next(word)
        elif option and dot:
            if not option.is_json:
                raise ConfigError(f"{option.flag} has no parts, got --{name}")
            _put(self.dotted.setdefault(key, {}), path, value if equals else self._next(word))
        elif option:
            if equals and option.type is bool:
                raise ConfigError(
                    f"{option.flag} is a switch and takes no value, got {value!r} "
                    f"(--no-{option.flag[2:]} turns it off)"
                )
            self.words.append(option.flag + equals + value)
        elif key.startswith("no_") and (positive := self._options.get(key[3:])):
            if positive.type is not bool:
                raise ConfigError(f"{positive.flag} is not a switch, got {word}")
            self.words.append("--no-" + positive.flag[2:])
        else:
            self._unknown(head.replace("_", "-"), value if equals else None)

    def _next(self, word: str) -> str:
        if not self._rest:
            raise ConfigError(f"{word} needs a value")
        return self._rest.pop(0)

    def _short(self, word: str) -> None:
        known = {option.info.short for option in self._options.values()}
        name = word.partition("=")[0]
        if name not in known and name[1:] in _foreign()["later"]["short"]:
            raise ConfigError(f"{name} is not supported yet")

    def _unknown(self, name: str, value: str | None) -> None:
        foreign = _foreign() if self._vllm else {"old": {}, "later": {}}
        later = {flag for flags in foreign["later"].values() for flag in flags}
        if old := foreign["old"].get(name):
            for _ in range(old["values"]):
                value = self._next(f"--{name}") if value is None else value
            if "only" in old and value not in old["only"]:
                raise ConfigError(f"--{name} {value} is not supported yet")
            sys.stderr.write(f"llmserve: --{name} is an old name without effect: {old['note']}\n")
            return
        if name in later or name.removeprefix("no-") in later:
            raise ConfigError(f"--{name} is not supported yet")
        known = [option.flag[2:] for option in self._options.values()] + ["config", "help"]
        known += [f"no-{o.flag[2:]}" for o in self._options.values() if o.type is bool]
        near = difflib.get_close_matches(name, [*known, *later], 1)
        later_hint = " (not supported yet)" if near and near[0] in later else ""
        hint = f"; did you mean --{near[0]}{later_hint}?" if near else ""
        raise ConfigError(f"unknown option --{name}{hint}")


def _foreign() -> dict[str, Any]:
    return tomllib.loads(_FOREIGN.read_text(encoding="utf-8"))


def _put(target: dict[str, Any], path: str, word: str) -> None:
    *parents, last = path.split(".")
    for key in parents:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{path}: {key} already has a value, {target!r}, which has no parts")
    try:
        target[last] = json.loads(word)
    except ValueError:
        target[last] = word


def _merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _no_text(value: Any, option: Option | None) -> str | None:
    """What YAML reads as something else though the flag is text."""
    if option is None or option.word_type is not str or value is None:
        return None
    words = value if isinstance(value, list) else [value]
    return next((repr(word) for word in words if not isinstance(word, str)), None)


def _yaml_words(path: str, options: Mapping[str, Option]) -> list[str]:
    """A YAML mapping of flags as the command line that means the same."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path}: must be a mapping of flags to values")
    words: list[str] = []
    for key, value in data.items():
        name = str(key).replace("_", "-")
        option = options.get(name.replace("-", "_"))
        if name in ("config", "help"):
            raise ConfigError(f"--{name} belongs on the command line")
        if isinstance(value, dict) and (option is None or option.is_json):
            try:
                words.append(f"--{name}={json.dumps(value)}")
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(f"--{name} must be a JSON object: {error}") from None
        elif isinstance(value, dict | list) and not (option is None or option.info.repeat):
            raise ConfigError(f"--{name} takes one value, got {value!r}")
        elif (other := _no_text(value, option)) is not None:  # a key 0123 would be 83, no False
            raise ConfigError(f"--{name} must be text, got {other}; put it in quotes")
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}={item}" for item in value]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def parse_flags(
    argv: Sequence[str],
    groups: Sequence[type],
    *,
    prog: str,
    description: str = "",
    model_tag: bool = True,
    vllm: bool = True,
) -> dict[str, Any]:
    """The flags given in `argv` (and in its `--config` file), as keywords for `groups`.

    `model_tag`: the model may also stand alone, as in `serve MODEL`. `vllm`: vLLM's old and unbuilt
    flags are known. Raises ConfigError, and SystemExit after `--help[=all|GROUP|FLAG]`.
    """
    options = options_of(groups)
    line = _Line(options, argv, vllm)
    if line.help is not None:
        print(_help_page(line.help, prog, description, groups, options, model_tag))
        raise SystemExit(0)
    parser = _parser(prog, description, groups, options, tag=model_tag)
    flags = _parse(parser, line)
    if line.config is not None:
        try:
            flags = _parse(parser, _Line(options, _yaml_words(line.config, options), vllm)) | flags
        except ConfigError as error:
            prefix = f"--config {line.config}: "
            message = error.message.removeprefix(prefix)
            raise ConfigError(prefix + message) from None
    return flags


def _parse(parser: argparse.ArgumentParser, line: _Line) -> dict[str, Any]:
    flags = vars(parser.parse_args(line.words))
    for name, overlay in line.dotted.items():
        flags[name] = _merge(flags.get(name, {}), overlay)
    tag = flags.pop("model_tag", None)
    if tag is not None and flags.setdefault("model", tag) != tag:
        raise ConfigError(f"the model is given twice: {tag} and --model {flags['model']}")
    return flags


def _help_page(
    topic: str,
    prog: str,
    description: str,
    groups: Sequence[type],
    options: Mapping[str, Option],
    tag: bool,
) -> str:
    if topic == "all":
        return _parser(prog, description, groups, options, tag=tag).format_help()
    if topic:
        key = topic.lstrip("-").replace("-", "_").lower()
        chosen = {n: o for n, o in options.items() if key in (n, o.group.__name__.lower())}
        if not chosen:
            chosen = {name: option for name, option in options.items() if key in name}
        if not chosen:
            raise ConfigError(f"--help={topic}: no such group or flag")
        shown = [group for group in groups if any(o.group is group for o in chosen.values())]
        return _parser(prog, description, shown, chosen, tag=tag).format_help()
    lines = [f"usage: {prog}{' [MODEL]' if tag else ''} [options]", "", description, ""]
    for group in groups:
        names = " ".join(o.flag for o in options.values() if o.group is group)
        lines += [f"{group.__name__}:", textwrap.fill(
            names, 96, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False,
            break_long_words=False,
        )]  # fmt: skip
    lines += ["", "--config FILE.yaml      flags from a file; the command line wins"]
    lines += ["--help=all|GROUP|FLAG   what they mean"]
    return "\n".join(lines)


def take(flags: dict[str, Any], group: type[_G]) -> _G:
    """Builds `group` from its keywords in `flags`, which are taken out."""
    names = [field.name for field in dataclasses.fields(group) if field.name in flags]  # type: ignore[arg-type]
    return group(**{name: flags.pop(name) for name in names})
