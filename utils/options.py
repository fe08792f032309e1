"""Options as a dataclass: read from a JSON file, overridden by the command line, each value checked against its type."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, Union

import msgspec

from utils.errors import InputError, nearest
from utils.files import read_object
from utils.parallel import cores

Options = TypeVar("Options")
PrecisionName = Literal["fp32", "bf16", "fp16"]


def option(
    default: Any, help: str, *, affects_result: bool = True, flag_value: str | None = None, choices: Collection[str] = ()
) -> Any:
    """Declare a field of an options dataclass.

    Args:
        help: text that ``--help`` shows.
        affects_result: whether the result depends on it, so that it must not change when a run is resumed.
        flag_value: value if the option is given on the command line without one; if None, a value is required.
        choices: allowed strings, for a field whose type cannot list them; looked up whenever options are read.
    """
    metadata = {"help": help, "affects_result": affects_result, "flag_value": flag_value, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def read_json_as(cls: type[Options], path: str | Path) -> Options:
    """Read a JSON object as dataclass ``cls``. Raises ``InputError`` naming the file and the key."""
    return options_from(cls, read_object(path), str(path))


def options_from(cls: type[Options], values: dict[str, Any], source: str) -> Options:
    """Make dataclass ``cls`` from JSON values read from ``source``. Raises ``InputError`` naming the source and the key."""
    values = _checked(cls, values, source)
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def parse_options(
    cls: type[Options], argv: Sequence[str], description: str, inherit: Mapping[str, Collection[str]] = MappingProxyType({})
) -> Options:
    """Read options: defaults, overridden by the JSON file of ``--config``, overridden by the command line.

    Args:
        inherit: maps an option that is itself the path of a JSON file of options to the keys to read from that file; they
            override the defaults only.

    Raises:
        InputError: an unknown option or key (with the nearest one), a wrong type, or an impossible value.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=description, formatter_class=layout, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="JSON", help="JSON file of these options; the command line overrides it")
    hints = _type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        _add_argument(parser, field, hints[field.name])
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [action.option_strings[0] for action in parser._actions if action.option_strings]
        flag = next((word for word in unknown if word.startswith("-")), unknown[0])
        raise InputError(f"unknown option {flag}{nearest(flag.split('=')[0], flags)}; --help lists all options")
    words = vars(given)
    config = words.pop("config", None)
    values = {} if config is None else _checked(cls, read_object(config), config)
    for name, word in words.items():
        values[name] = _convert(word, hints[name], f"--{name}", strict=isinstance(word, bool))
    inherited: dict[str, Any] = {}
    for name, keys in inherit.items():
        if (path := values.get(name)) is not None:
            inherited |= _checked(cls, {key: value for key, value in read_object(path).items() if key in keys}, path)
    return options_from(cls, inherited | values, f"{config} and the command line" if config else "command line")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(message)


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    default = "" if field.default in ("", (), None) else f" (default {field.default})"
    settings: dict[str, Any] = {"help": f"{field.metadata['help']}{default}".replace("%", "%%")}
    kind = next(kind for kind in _alternatives(hint) if kind is not type(None))
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) in (tuple, list):
        settings |= {"nargs": "+", "metavar": "X"}
    else:
        settings["metavar"] = "|".join(_choices(hint)) or kind.__name__.upper()
        if field.metadata["flag_value"] is not None:
            settings |= {"nargs": "?", "const": field.metadata["flag_value"]}
    parser.add_argument(f"--{field.name}", **settings)
    if type(None) in _alternatives(hint) or field.default == "":
        unset = "" if field.default == "" else None
        parser.add_argument(
            f"--no-{field.name}", action="store_const", const=unset, dest=field.name, help=f"unset {field.name}"
        )


def _type_hints(cls: type) -> dict[str, Any]:
    """Return the type of each field, with ``str`` replaced by a ``Literal`` of the field's ``choices``, if any."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if choices := field.metadata.get("choices"):
            kinds = (Literal[tuple(choices)] if kind is str else kind for kind in _alternatives(hints[field.name]))
            hints[field.name] = Union[tuple(kinds)]  # noqa: UP007
    return hints


def _choices(hint: Any) -> list[str]:
    """Return the strings of the ``Literal`` in a type, if any."""
    return [choice for kind in _alternatives(hint) if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _checked(cls: type, values: dict[str, Any], source: str) -> dict[str, Any]:
    hints = _type_hints(cls)
    for key in values:
        if key not in hints:
            raise InputError(f"{source}: unknown key {key!r}{nearest(key, hints)}")
    return {key: _convert(value, hints[key], f"{source}: {key}", strict=True) for key, value in values.items()}


def _convert(value: Any, hint: Any, where: str, *, strict: bool) -> Any:
    try:
        return msgspec.convert(value, hint, strict=strict)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # UnicodeEncodeError: half of a surrogate pair
        if choices := _choices(hint):
            expected = f"one of {', '.join(choices)}{nearest(str(value), choices)}"
        else:
            expected = str(hint) if "[" in str(hint) else getattr(hint, "__name__", str(hint))
        raise InputError(f"{where}: {json.dumps(value)} given, expected {expected}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Device, arithmetic and data loading."""

    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps; auto uses a GPU if there is one", affects_result=False)
    precision: Literal["auto", PrecisionName] | None = option(
        None, "arithmetic of the encoder, fp32 unless fp16 is set; auto: bf16 if the device is fast at it", affects_result=False
    )
    fp16: bool = option(
        False, "the same as precision fp16 on a CUDA device; elsewhere fp32, with a warning", affects_result=False
    )
    n_workers: int | None = option(
        None, "processes that read data; 0 reads in the main process; default: one per core, at most 4", affects_result=False
    )
    pin_mem: bool = option(True, "read into page-locked memory if the device is a GPU", affects_result=False)

    @property
    def workers(self) -> int:
        """The number of processes that read data."""
        return min(4, cores()) if self.n_workers is None else self.n_workers


def require(options: object, *names: str) -> None:
    """Raise ``InputError`` for the first of these options that is not set."""
    for name in names:
        if not getattr(options, name):
            raise InputError(f"{name} is missing; give --{name} or set it in the JSON file of --config")


def check_sizes(options: object) -> None:
    """Raise ``InputError`` for the first integer that is 2^31 or larger."""
    for name, value in vars(options).items():
        if isinstance(value, int) and value >= 2**31:
            raise InputError(f"{name} is {value}, expected less than {2**31}")


def check_at_least(options: object, least: float, *names: str) -> None:
    """Raise ``InputError`` for the first of these options that is less than ``least``, or not finite; None is neither."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise InputError(f"{name} is {value}, expected at least {least}")
