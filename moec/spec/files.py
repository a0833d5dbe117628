"""Load a spec from a preset name, a spec file or a checkpoint folder; write and compare specs."""

import os
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from moec.spec.bounded.limits import JSON, YAML
from moec.spec.bounded.read import parse_json, parse_yaml, read_bytes
from moec.spec.data import Frozen
from moec.spec.errors import refuse
from moec.spec.fields import shown
from moec.spec.hf.config import read_config
from moec.spec.hf.forms import checkpoint_folder, refuse_other_form
from moec.spec.model import ModelSpec
from moec.spec.mtp.layer import with_mtp
from moec.spec.presets import PRESETS
from moec.spec.scheme import NAMED, Scheme


def load_spec(source: str | Path | ModelSpec, mtp: bool = False) -> ModelSpec:
    """Load a spec from a preset name, a spec file (.yaml, .yml, .json) or a checkpoint folder.

    That of a folder is what its config.json says; `moec.weights.spec_of` reads the tensors too.
    `mtp` is as in `moec.export`.

    Raises:
        MoecError: `source` is none of these, or its contents are not a valid spec.
    """
    if isinstance(source, ModelSpec):
        return with_mtp(source, mtp) if mtp else source
    if str(source) in PRESETS:
        return with_mtp(PRESETS[str(source)], mtp)
    return read_spec(source, mtp)


def read_spec(source: str | Path, mtp: bool = False) -> ModelSpec:
    """Load a spec from a spec file or a checkpoint folder, which may have the name of a preset.

    `mtp` is as in `moec.export`.

    Raises:
        MoecError: as `load_spec`.
    """
    path = Path(source)
    if folder := checkpoint_folder(source):
        if not os.path.lexists(folder / "config.json"):
            refuse_other_form(folder)
        return read_config(folder / "config.json", mtp)
    if path.name != "config.json" and _is_data_file(path):
        found = _read_file(path, ModelSpec, "a spec that follows the schema")
        return with_mtp(found, mtp or found.text.mtp == "built")
    refuse_other_form(source)
    refuse(
        source,
        "neither a preset, nor a spec file, nor a checkpoint folder",
        f"one of {', '.join(PRESETS)}, a .yaml or .json file, or a folder with config.json",
        "moec spec list",
    )


def load_scheme(source: str | Path | Scheme) -> Scheme:
    """Load a scheme by its name, or from a file (.yaml, .yml, .json).

    Raises:
        MoecError: there is no such scheme or file, or the file is not a valid scheme.
    """
    if isinstance(source, Scheme):
        return source
    if str(source) in NAMED:
        return NAMED[str(source)]
    path = Path(source)
    if _is_data_file(path):
        expected = "a scheme with the fields name, rules, block and cache; see docs/formats.md"
        return _read_file(path, Scheme, expected)
    refuse(
        f"--scheme {source}",
        "neither the name of a scheme nor a file that holds one",
        f"one of {', '.join(NAMED)}, or a .yaml or .json file",
        "choose one of them",
    )


def _is_data_file(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml", ".json") and os.path.isfile(path)


_Data = TypeVar("_Data", bound=Frozen)


def _read_file(path: Path, kind: type[_Data], expected: str) -> _Data:
    is_json = path.suffix == ".json"
    what, fix = "a readable JSON or YAML file", "correct the file"
    raw = read_bytes(path, (JSON if is_json else YAML).bytes, what, fix)
    try:
        values = parse_json(raw, path) if is_json else parse_yaml(raw, path)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        refuse(path, " ".join(str(error).split()), what, fix)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "top level"
        refuse(
            f"{path}: {field}",
            f"{first['msg'][:400]} (value {shown(first['input'])})",
            expected,
            "moec spec schema" if kind is ModelSpec else "correct the file",
        )


def dump_yaml(spec: ModelSpec) -> str:
    """Write `spec` as YAML. `load_spec` reads it back to an equal spec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)


def diff(left: ModelSpec, right: ModelSpec) -> list[tuple[str, Any, Any]]:
    """List the fields that differ, as (path, left value, right value), without name and notes.

    A field that one side does not have is None there.
    """
    rows = [
        _flatten(spec.model_dump(mode="json", exclude={"name", "notes"})) for spec in (left, right)
    ]
    paths = dict.fromkeys([*rows[0], *rows[1]])
    return [
        (path, rows[0].get(path), rows[1].get(path))
        for path in paths
        if rows[0].get(path) != rows[1].get(path)
    ]


#: fields that do not change what a model computes
_APART = ("provenance", "sampling", "repetition_penalty", "tokens.bos", "tokens.eos", "tokens.pad")


def other_model(found: ModelSpec, wanted: ModelSpec, *apart: str) -> list[tuple[str, Any, Any]]:
    """List the fields in which another model differs, as `diff` does.

    Name, origin, end tokens and sampling may differ, and fields that start with one of `apart`.
    """
    rows = [row for row in diff(found, wanted) if not row[0].startswith((*_APART, *apart))]
    return [row for row in rows if not is_left_out(*row)]


def is_left_out(path: str, found: Any, wanted: Any) -> bool:
    """Whether a row of `diff` is about a layer of multi-token prediction that nobody builds."""
    return path == "text.mtp" and {found, wanted} == {"none", "aside"}


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, by their dotted path."""
    if not isinstance(value, dict):
        return {path: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in _flatten(inner, f"{path}.{name}" if path else name).items()
    }
