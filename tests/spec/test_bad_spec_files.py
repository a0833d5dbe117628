"""A spec file that is damaged or says nonsense gives one clear message."""

import json
from pathlib import Path

import pytest
import yaml

import moec
from moec.spec.bounded import read
from moec.spec.bounded.read import parse_json, parse_yaml
from moec.spec.files import dump_yaml
from tests.damage import NESTED, SPEC, text
from tests.refusals import refused_and_nothing_left

#: what is wrong -> (name of the file, what is in it, what the message must name)
SPEC_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "broken YAML": ("x.yaml", "name: [", "x.yaml"),
    "broken JSON": ("x.json", "{", "x.json"),
    "no text": ("x.yaml", b"\xff\xfe\x00", "x.yaml"),
    "a list": ("x.yaml", "- 1", "x.yaml"),
    "empty": ("x.yaml", "", "x.yaml"),
    "YAML that builds objects": ("x.yaml", "!!python/object/apply:os.getcwd []", "x.yaml"),
    "YAML nested without end": ("x.yaml", NESTED, "x.yaml"),
    "JSON nested without end": ("x.json", NESTED, "x.json"),
    "an unknown field": ("x.yaml", dump_yaml(SPEC) + "sparkle: 3\n", "sparkle"),
    "a missing field": ("x.yaml", "name: x\nprovenance: custom\ndtype: bf16\n", "text"),
    "NaN": ("x.yaml", dump_yaml(SPEC).replace("norm_eps: 1.0e-05", "norm_eps: .nan"), "norm_eps"),
    "layers beyond memory": (
        "x.yaml",
        dump_yaml(SPEC).replace("layers: 8", f"layers: {10**30}"),
        "layers",
    ),
    "half a character in JSON": ("x.json", r'{"notes": ["n\ud800"]}', "x.json"),
    "half a character in YAML": ("x.yaml", r'notes: ["n\ud800"]', "x.yaml"),
    "another suffix": ("x.txt", dump_yaml(SPEC), "x.txt"),
}


@pytest.mark.parametrize("case", SPEC_FILES)
def test_a_broken_spec_file_is_refused(tmp_path: Path, case: str) -> None:
    name, content, names = SPEC_FILES[case]
    text(name, content)(tmp_path)
    refused_and_nothing_left(
        tmp_path, lambda: moec.export(tmp_path / name, out=tmp_path / "out"), names
    )


@pytest.mark.parametrize(
    "lone", [r"\ud800", r"\uDC00", r"\\\uD800", r"\ud800\\\udc00", r"\ud800\ud83d\ude00"]
)
def test_half_a_character_is_no_json(lone: str) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate \\u[dD]"):
        parse_json(f'["é{lone}"]'.encode(), "x")


def test_a_whole_character_and_a_backslash_are_json() -> None:
    raw = rb'["\ud83d\ude00", "\\ud800", "\ud7ff\ue000"]'
    assert parse_json(raw, "x") == json.loads(raw) == ["\U0001f600", r"\ud800", "\ud7ff\ue000"]


def test_yaml_without_libyaml_has_no_half_of_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_YAML", yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError, match="surrogate"):
        parse_yaml(rb'notes: ["n\ud800"]', "x")
