"""Configs to and from plain mappings, TOML files, JSON files and command-line flags, strictly.

What is unknown, missing or of the wrong type raises UsageError that names the key by its full path, as does every
check that a config class makes of itself.
"""

import difflib
import json
import os
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moesaic.config import DataConfig, TrainConfig
from moesaic.errors import UsageError
from moesaic.presets import PRESETS
from moesaic.tokenizer import tokenizer_vocab_size

Config = TypeVar("Config")

StartValues = Callable[[str], Mapping[str, Any]]
"""MODEL -> `model`, its config as a mapping, and `tokenizer`, a path."""


class FlagText(str):
    """A value as typed on the command line; its type is settled by the key it is for."""


def from_mapping(cls: type[Config], mapping: Mapping[str, Any], where: str = "") -> Config:
    """A config of class `cls` from nested mappings; `where` is the key path of `mapping` for messages.

    Integers pass as floats, sequences as tuples and "none" as an absent optional value. Nothing else is converted.
    """
    if not isinstance(mapping, Mapping):
        raise UsageError(f"{where or 'the config'} is {_shown(mapping)}; it must be a table of keys and values")
    known = {field.name: field for field in fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in mapping:
        if key not in known:
            raise UsageError(f"unknown key {_join(where, key)}; {_suggest(key, known)}")
    missing = [_join(where, name) for name, field in known.items() if _is_required(field) and name not in mapping]
    if missing:
        raise UsageError(f"missing {', '.join(missing)}; set {'it' if len(missing) == 1 else 'them'} to a value")
    kinds = get_type_hints(cls)
    values = {key: _convert(kinds[key], value, _join(where, key)) for key, value in mapping.items()}
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"[{where}] {error}" if where else str(error)) from error


def to_mapping(config: object) -> dict[str, Any]:
    """The nested dict that `from_mapping` reads back; absent optional values are left out."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}  # pyright: ignore[reportArgumentType]
    return {name: _plain(value) for name, value in values.items() if value is not None}


def read_train_config(
    path: Path, overrides: Sequence[str] = (), start_values: StartValues | None = None
) -> TrainConfig:
    """The training run that a TOML file, or the config.json of a run directory, describes.

    `overrides` are flags such as ["--optimizer.lr", "1e-3", "--model.moe.num-experts=8", "--tensorboard"]. [model]
    may name a `preset`, over which its other keys lie; `model.vocab_size` defaults to that of the tokenizer. With
    `init_from`, `start_values` gives from that MODEL what a TOML file does not say: `model` and `tokenizer`.
    """
    mapping = _read_mapping(path)
    for key_path, value in _parse_flags(overrides):
        _set(mapping, key_path, value)
    init_from = mapping.get("init_from")
    if init_from and isinstance(init_from, str) and start_values and path.suffix != ".json":
        _start_from(mapping, start_values(str(init_from)))
    model = mapping.get("model")
    if isinstance(model, dict):
        model = _with_preset(model)
        if "vocab_size" not in model:
            data = from_mapping(DataConfig, mapping.get("data", {}), "data")
            model["vocab_size"] = tokenizer_vocab_size(data.tokenizer)
        mapping["model"] = model
    return from_mapping(TrainConfig, mapping)


def _start_from(mapping: dict[str, Any], values: Mapping[str, Any]) -> None:
    model, data = mapping.get("model", {}), mapping.get("data", {})
    if isinstance(model, dict) and isinstance(data, dict):
        mapping["model"] = _overlaid(values["model"], _with_preset(model))
        mapping["data"] = {"tokenizer": values["tokenizer"], **data}


def write_train_config(config: TrainConfig, path: Path) -> None:
    """Write config.json; a reader sees the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(to_mapping(config), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_run_config(run_directory: Path, config: TrainConfig) -> None:
    write_train_config(config, run_directory / "config.json")


def read_run_config(run_directory: Path) -> TrainConfig:
    return read_train_config(run_directory / "config.json")


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"cannot read the config {path}: {error.strerror}") from error
    try:
        mapping = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} does not parse: {error}") from error  # both say the line
    if not isinstance(mapping, dict):
        raise UsageError(f"{path} is {_shown(mapping)}; it must be a table of keys and values")
    return mapping


def _parse_flags(flags: Sequence[str]) -> list[tuple[list[str], FlagText]]:
    """`--a.b-c V`, `--a.b_c=V` and a bare `--flag`, as key paths with values."""
    parsed = []
    position = 0
    while position < len(flags):
        flag = flags[position]
        if not flag.startswith("--") or len(flag) == 2:
            raise UsageError(f"unexpected argument {flag!r}; config flags look like --optimizer.lr 1e-3")
        name, equals, value = flag[2:].partition("=")
        follows = position + 1 < len(flags) and not flags[position + 1].startswith("--")
        if not equals:
            value = flags[position + 1] if follows else "true"
        position += 1 if equals or not follows else 2
        parsed.append((name.replace("-", "_").split("."), FlagText(value)))
    return parsed


def _set(mapping: dict[str, Any], key_path: list[str], value: FlagText) -> None:
    for depth, key in enumerate(key_path[:-1]):
        mapping = mapping.setdefault(key, {})
        if not isinstance(mapping, dict):
            raise UsageError(f"unknown key {'.'.join(key_path)}; {'.'.join(key_path[: depth + 1])} is a single value")
    mapping[key_path[-1]] = value


def _with_preset(model: dict[str, Any]) -> dict[str, Any]:
    if "preset" not in model:
        return dict(model)
    name = str(model["preset"])
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r} in model.preset; {_suggest(name, PRESETS)}")
    return _overlaid(PRESETS[name], {key: value for key, value in model.items() if key != "preset"})


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _overlaid(old, value)
        merged[key] = value
    return merged


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`, or UsageError naming `where`."""
    if isinstance(value, FlagText):
        value = _parse_flag_value(value, kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None or value == "none":
            return None
        return _convert(next(one for one in arguments if one is not types.NoneType), value, where)
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(str(choice) for choice in arguments)
            raise UsageError(f"{where} is {_shown(value)}; choose one of {choices}")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if is_dataclass(kind):
        return from_mapping(kind, value, where)  # pyright: ignore[reportArgumentType]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{where} is {_shown(value)}; it must be {_TYPE_WORDS[kind]}")
    return value


def _convert_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UsageError(f"{where} is {_shown(value)}; it must be a list in brackets")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise UsageError(f"{where} has {len(value)} values; it takes {len(kinds)}")
    return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _parse_flag_value(text: FlagText, kind: Any) -> Any:
    """A TOML value where it parses as one, else the text itself; for text keys the digits stay text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:  # not TOML, or a number of thousands of digits
        return str(text)
    value = parsed["value"]
    is_text_key = kind is str or get_origin(kind) is Literal
    return str(text) if len(parsed) > 1 or (is_text_key and not isinstance(value, str)) else value


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_mapping(value)
    return list(value) if isinstance(value, tuple) else value


def _is_required(field: "Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _suggest(key: str, known: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
