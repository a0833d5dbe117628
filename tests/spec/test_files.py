import json
from pathlib import Path

import pytest
from hypothesis import given

from moec.spec.errors import MoecError
from moec.spec.files import diff, dump_yaml, load_spec
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from tests.strategies import specs


@pytest.mark.full
@given(spec=specs())
def test_yaml_and_json_files_give_the_same_spec(
    tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec
) -> None:
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.yaml").write_text(dump_yaml(spec))
    (folder / "b.json").write_text(spec.model_dump_json())
    assert load_spec(folder / "a.yaml") == load_spec(folder / "b.json") == spec


def test_diff_names_paths_and_values() -> None:
    rows = diff(PRESETS["scout"], PRESETS["maverick"])
    assert ("text.ffn", "M", "DM") in rows
    assert ("text.experts.count", 16, 128) in rows


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.yaml", "layers: [", "readable"),
        ("a.json", "{", "readable"),
        ("a.yaml", "just a string", "top level"),
        ("a.json", json.dumps({"name": "x"}), "provenance"),
        ("a.txt", "", "neither a preset"),
    ],
)
def test_bad_spec_files_name_what_is_wrong(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(MoecError) as caught:
        load_spec(tmp_path / name)
    assert message in str(caught.value)


def test_unknown_fields_of_a_spec_file_are_refused(tmp_path: Path) -> None:
    values = PRESETS["scout"].model_dump(mode="json")
    values["text"]["layrs"] = 48
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(MoecError, match=r"text\.layrs"):
        load_spec(tmp_path / "a.json")
