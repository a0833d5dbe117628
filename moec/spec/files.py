"""Find a spec by preset name, spec file or checkpoint folder; write and compare specs."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from moec.spec.errors import refuse
from moec.spec.frozen import Frozen
from moec.spec.hf.config import read_config
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.scheme import SCHEMES, Scheme


def load_spec(source: str | Path | ModelSpec) -> ModelSpec:
    """A spec from a preset name, a spec file (.yaml, .yml, .json) or a checkpoint folder."""
    if isinstance(source, ModelSpec):
        return source
    if str(source) in PRESETS:
        return PRESETS[str(source)]
    path = Path(source)
    # os.path, unlike pathlib, says no instead of raising on names that no system has.
    if str(source) and os.path.isdir(path):
        return read_config(path / "config.json")
    if path.suffix in (".yaml", ".yml", ".json") and os.path.isfile(path):
        return _read_file(path, ModelSpec, "a spec by the schema")
    refuse(
        source,
        "neither a preset, nor a spec file, nor a checkpoint folder",
        f"one of {', '.join(PRESETS)}, a .yaml or .json file, or a folder with config.json",
        "moec spec list",
    )


def load_scheme(source: str | Path | Scheme) -> Scheme:
    """An FP8 scheme by name, or from a file (.yaml, .yml, .json)."""
    if isinstance(source, Scheme):
        return source
    if str(source) in SCHEMES:
        return SCHEMES[str(source)]
    path = Path(source)
    if path.suffix in (".yaml", ".yml", ".json") and os.path.isfile(path):
        return _read_file(path, Scheme, "a scheme: name, rules, block, cache; see docs/formats.md")
    refuse(
        f"--scheme {source}",
        "neither a scheme nor a file of one",
        f"{', '.join(SCHEMES)}, or a .yaml or .json file",
        "choose one of them",
    )


_Data = TypeVar("_Data", bound=Frozen)


def _read_file(path: Path, kind: type[_Data], expected: str) -> _Data:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        summary = " ".join(str(error).split())
        refuse(path, summary, "a readable JSON or YAML file", "correct it")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "top level"
        refuse(
            f"{path}: {field}",
            f"{first['msg']} (value {str(first['input'])[:80]})",
            expected,
            "moec spec schema" if kind is ModelSpec else "correct it",
        )


def dump_yaml(spec: ModelSpec) -> str:
    """`spec` as YAML that `load_spec` reads back to an equal spec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)


def diff(left: ModelSpec, right: ModelSpec) -> list[tuple[str, Any, Any]]:
    """Fields that differ, as (path, left value, right value); names and notes are left out."""
    rows = [
        _flat(spec.model_dump(mode="json", exclude={"name", "notes"})) for spec in (left, right)
    ]
    paths = dict.fromkeys([*rows[0], *rows[1]])
    return [
        (path, rows[0].get(path), rows[1].get(path))
        for path in paths
        if rows[0].get(path) != rows[1].get(path)
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in _flat(inner, f"{path}.{name}" if path else name).items()
    }
