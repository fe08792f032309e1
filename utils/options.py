"""Options as a dataclass: read from a JSON file, overridden by the command line, each value checked against its type."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import operator
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import msgspec

from utils.errors import InputError, nearest
from utils.files import read_json

Options = TypeVar("Options")


def option(
    default: Any,
    help: str,
    *,
    affects_result: bool = True,
    flag_value: str | None = None,
    choices: Collection[str] | None = None,
) -> Any:
    """A field of an options dataclass.

    Args:
        help: the sentence that ``--help`` shows.
        affects_result: whether the result depends on it, so that it must not change when a run is resumed.
        flag_value: the value when the option is given on the command line without one; if None, a value is required.
        choices: the texts that it may be, where a registry has them and its type cannot say; looked up when options are read.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "affects_result": affects_result, "flag_value": flag_value, "choices": choices}
    )


def read_options(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ``InputError`` when it holds anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def read_json_as(cls: type[Options], path: str | Path) -> Options:
    """Read a JSON object as dataclass ``cls``. Raises ``InputError`` that names the file and the key."""
    return options_from(cls, read_options(path), str(path))


def options_from(cls: type[Options], values: dict[str, Any], source: str) -> Options:
    """Dataclass ``cls`` from JSON values that came from ``source``. Raises ``InputError`` that names it and the key."""
    return _build(cls, _checked(cls, values, source), source)


def parse_options(
    cls: type[Options], argv: Sequence[str], description: str, inherit: Mapping[str, Collection[str]] = MappingProxyType({})
) -> Options:
    """Options from ``argv``: defaults, then the JSON file of ``--config`` if given, then the command line, in any order.

    Args:
        inherit: for an option that is itself the path of a JSON file of options, which of that file's keys are read from it,
            after the defaults and before everything else.

    Raises:
        InputError: an unknown option or key (with the nearest one), a wrong type, or an impossible value.
    """
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="JSON", help="a JSON file of these options; the command line wins over it")
    hints = _hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        _add_argument(parser, field, hints[field.name])
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [action.option_strings[0] for action in parser._actions if action.option_strings]
        flag = next((word for word in unknown if word.startswith("-")), unknown[0])
        raise InputError(f"unknown option {flag}{nearest(flag.split('=')[0], flags)}")
    from_command_line = vars(given)
    config = from_command_line.pop("config", None)
    from_file = _checked(cls, read_options(config), config) if config else {}
    overriding = {
        name: _convert(value, hints[name], f"--{name}", strict=isinstance(value, bool))
        for name, value in from_command_line.items()
    }
    values = from_file | overriding
    inherited: dict[str, Any] = {}
    for name, keys in inherit.items():
        if path := values.get(name):
            known = {key: value for key, value in read_options(path).items() if key in keys}
            inherited |= _checked(cls, known, path)
    return _build(cls, inherited | values, f"{config} and the command line" if config else "command line")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(message)


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    default = "" if field.default in ("", (), None) else f" (default {field.default})"
    words = f"{field.metadata['help']}{default}".replace("%", "%%")
    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    if kinds == [bool]:
        parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=words)
    elif typing.get_origin(kinds[0]) in (tuple, list):
        parser.add_argument(f"--{field.name}", nargs="+", help=words, metavar="X")
    else:
        flag_value = field.metadata["flag_value"]
        optional: dict[str, Any] = {} if flag_value is None else {"nargs": "?", "const": flag_value}
        parser.add_argument(
            f"--{field.name}", help=words, metavar="|".join(_choices(hint)) or kinds[0].__name__.upper(), **optional
        )


def _hints(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass; that of texts from a registry is the ``Literal`` of what is in it now."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if choices := field.metadata.get("choices"):
            kinds = tuple(Literal[tuple(choices)] if kind is str else kind for kind in _alternatives(hints[field.name]))
            hints[field.name] = functools.reduce(operator.or_, kinds)
    return hints


def _choices(hint: Any) -> list[str]:
    """The texts of a ``Literal``, and of what has it as an alternative; else nothing."""
    return [choice for kind in _alternatives(hint) if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _checked(cls: type, values: dict[str, Any], source: str) -> dict[str, Any]:
    hints = _hints(cls)
    for key in values:
        if key not in hints:
            raise InputError(f"{source}: unknown key {key!r}{nearest(key, hints)}")
    return {key: _convert(value, hints[key], f"{source}: {key}", strict=True) for key, value in values.items()}


def _convert(value: Any, hint: Any, where: str, *, strict: bool) -> Any:
    try:
        return msgspec.convert(value, hint, strict=strict)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # half of a surrogate pair is no text
        choices = _choices(hint)
        expected = (
            "one of " + ", ".join(choices) + nearest(str(value), choices)
            if choices
            else str(hint if "[" in str(hint) else getattr(hint, "__name__", hint))
        )
        raise InputError(f"{where}: {json.dumps(value)} given, expected {expected}") from error


def _build(cls: type[Options], values: dict[str, Any], source: str) -> Options:
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Where and how numbers are computed."""

    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps; auto takes the GPU where there is one", affects_result=False)
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = option(
        None,
        "arithmetic of the encoder; fp32 unless fp16 is set; auto is bf16 where the device computes it fast",
        affects_result=False,
    )
    fp16: bool = option(
        False,
        "on a CUDA device the same as precision fp16, with loss scaling; elsewhere fp32, with a warning",
        affects_result=False,
    )
    n_workers: int = option(4, "processes that read and decode data; 0 reads in the main process", affects_result=False)
    pin_mem: bool = option(True, "read into page-locked memory when the device is a GPU", affects_result=False)


def require(options: object, *names: str) -> None:
    """Raise ``InputError`` for the first of these options that was given nowhere."""
    for name in names:
        if not getattr(options, name):
            raise InputError(f"{name} is missing, it has no default")


def check_sizes(options: object) -> None:
    """Raise ``InputError`` for the first whole number that is larger than any of them can mean."""
    for name, value in vars(options).items():
        if isinstance(value, int) and value >= 2**31:
            raise InputError(f"{name} is {value}, expected less than {2**31}")


def check_at_least(options: object, least: float, *names: str) -> None:
    """Raise ``InputError`` for the first of these options that is smaller than ``least``, or not a finite number."""
    for name in names:
        value = getattr(options, name)
        if not (value >= least and math.isfinite(value)):
            raise InputError(f"{name} is {value}, expected at least {least}")
