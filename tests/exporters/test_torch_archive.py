"""The file of a program: the same bytes from every process, and nothing in it ever runs."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.artefact.artefact import Artefact, open_artefact
from moec.exporters.as_written import other_files
from moec.exporters.torch.archive import ID, MODEL, difference
from moec.exporters.torch.program import same_program
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from tests.damage import listed_again

SAMPLES = "archive/data/sample_inputs/model.pt"
CONSTANTS = "archive/data/constants/model_constants_config.json"


@pytest.fixture(scope="module")
def bound(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moec.export(tiny, target="torch", out=tmp_path_factory.mktemp("torch") / "art").path


class _Payload:
    """Its pickle writes the file MARK, wherever a process unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def rewrite(file: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Change members of an archive, and let the manifest agree, as a stranger's tool does."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    listed_again(file.parent, file.name)


def _program(members: dict[str, bytes], change: Callable[[Any], None]) -> None:
    program = json.loads(members[MODEL])
    change(program)
    members[MODEL] = json.dumps(program).encode()


def _symbol(expression: str) -> Callable[[Any], None]:
    def change(program: Any) -> None:
        values = program["graph_module"]["graph"]["tensor_values"]
        values["input_ids"]["sizes"][0] = {"as_expr": {"expr_str": expression, "hint": None}}

    return change


@pytest.mark.parametrize("kind", ["samples", "constants", "expression"])
def test_a_strangers_program_runs_nothing(damaged: Path, tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "mark"
    payload = pickle.dumps(_Payload(mark))

    def change(members: dict[str, bytes]) -> None:
        if kind == "samples":
            members[SAMPLES] = payload
        elif kind == "constants":
            members["archive/data/constants/model.pt"] = payload
            del members[CONSTANTS]
        else:
            source = f"__import__('os').mkdir({str(mark)!r})"
            _program(members, _symbol(source))

    rewrite(damaged / "model.pt2", change)
    session = moec.open_session(damaged)
    session.generate([[5, 6, 7]], max_new_tokens=2)
    artefact = open_artefact(damaged)
    assert same_program(artefact, "model") is not None
    assert not mark.exists()


@pytest.fixture
def damaged(bound: Path, tmp_path: Path) -> Path:
    """A copy of the artefact whose files can be changed; the weights are links."""
    out = tmp_path / "art"
    out.mkdir()
    for file in bound.iterdir():
        if file.suffix == ".safetensors":
            os.link(file, out / file.name)
        else:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def test_torch_never_loads_a_program(bound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("torch.export.load")

    monkeypatch.setattr(torch.export, "load", load)
    monkeypatch.setattr(torch, "load", load)
    assert moec.open_session(bound).logits([[5, 6]]).shape == (1, 2, 4096)


def test_the_stored_program_is_what_the_exporter_writes(bound: Path) -> None:
    artefact = open_artefact(bound)
    assert [same_program(artefact, part) for part in artefact.parts] == [None, None]
    with zipfile.ZipFile(bound / "model.pt2") as archive:
        assert archive.read(SAMPLES) == b""  # torch wants the member, which would be a pickle
        assert {row.date_time[0] for row in archive.infolist()} == {1980}


def _epsilon(program: Any) -> None:
    for node in program["graph_module"]["graph"]["nodes"]:
        for each in node["inputs"]:
            if each["arg"] == {"as_float": 1e-5}:
                each["arg"] = {"as_float": 1e-3}


def _version(program: Any) -> None:
    program["torch_version"] = "2.11.0"


CASES: dict[str, tuple[Callable[[dict[str, bytes]], None], str]] = {
    "epsilon": (lambda m: _program(m, _epsilon), "other arguments"),
    "version": (lambda m: _program(m, _version), "torch 2.11.0 wrote it"),
    "both": (lambda m: _program(m, lambda p: (_epsilon(p), _version(p))), "other arguments"),
    "node": (lambda m: _program(m, lambda p: p["graph_module"]["graph"]["nodes"].pop()), "node "),
    "guards": (lambda m: _program(m, lambda p: p.pop("guards_code")), "other bytes"),
    "list": (lambda m: m.update({MODEL: b"[]"}), "no program"),
    "deep": (lambda m: m.update({MODEL: b"[" * 100_000}), "no program"),
    "gone": (lambda m: m.pop(MODEL), "no program"),
    "pickle": (lambda m: m.update({"archive/data/more.pt": b"x"}), "never writes"),
    "member": (lambda m: m.pop(CONSTANTS), "no member"),
    "id": (lambda m: m.update({ID: b"1"}), ID),
    "order": (lambda m: m.update({CONSTANTS: m.pop(CONSTANTS)}), "another archive"),
}


@pytest.mark.parametrize("case", CASES)
def test_another_program_is_described(bound: Path, tmp_path: Path, case: str) -> None:
    expected = (bound / "model.pt2").read_bytes()
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    file = tmp_path / "model.pt2"
    file.write_bytes(expected)
    change, says = CASES[case]
    rewrite(file, change)
    found = difference(file, expected)
    assert found is not None and says in found, found


def test_files_that_are_no_archive_are_described(bound: Path, tmp_path: Path) -> None:
    expected = (bound / "model.pt2").read_bytes()
    file = tmp_path / "model.pt2"
    assert "cannot be read" in (difference(file, expected) or "")
    for data in (b"", b"PK" * 100, expected[:-1], bytes(len(expected))):
        file.write_bytes(data)
        assert "not an archive" in (difference(file, expected) or "")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MODEL, bytes(1 << 24))  # kilobytes that unpack to megabytes
    assert "compressed" in (difference(file, expected) or "")
    os.truncate(file, 1 << 33)
    assert "bytes, where" in (difference(file, expected) or "")


_BUILD = (
    "import sys, moec\nmoec.export(moec.load_spec('tiny-scout'), target='torch', out=sys.argv[1])\n"
)


@pytest.mark.slow
def test_every_process_writes_the_same_bytes(tmp_path: Path) -> None:
    here: Artefact = moec.export(moec.load_spec("tiny-scout"), target="torch", out=tmp_path / "a")
    other = tmp_path / "elsewhere"
    other.mkdir()
    more = {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    environment = {**os.environ, **more, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", _BUILD, str(other / "b")]
    subprocess.run(command, check=True, cwd=other, env=environment)
    for name in here.manifest.files:
        assert (here.path / name).read_bytes() == (other / "b" / name).read_bytes(), name


def test_a_program_that_is_too_small_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's manifest may say 512 layers, whose program takes minutes to export."""
    spec = reduced(PRESETS["tiny-scout"], 2).model_copy(update={"vision": None})
    art = moec.export(spec, target="torch", precision="fp32", out=tmp_path / "art")
    assert other_files(art) == {}
    many = spec.model_copy(update={"text": spec.text.model_copy(update={"layers": 12})})
    forged = replace(art, manifest=art.manifest.model_copy(update={"spec": many}))
    monkeypatch.setattr("moec.targets.torch.build.program_of", lambda graph: 1 / 0)
    assert "nodes, where the exporter writes some" in other_files(forged)["model.pt2"]
