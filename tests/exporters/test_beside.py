"""What a stranger plants in genai's folder is found: the proof names the file and the field."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.artefact.artefact import open_artefact
from moec.exporters.beside import beside, stale
from moec.exporters.onnx.genai import CONFIG, FOLDER, WEIGHTS, write_genai
from moec.runtime.proof.graph_files import graph_files
from tests.damage import Damage, json_file, listed_again, put, remove, text
from tests.old_genai import as_before
from tests.small import SMALL, small_with_tokenizer

FILE = f"{FOLDER}/{CONFIG}"
OPTIONS = "model.decoder.session_options"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    return small_with_tokenizer(tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artefact of target ort for each placement of the weights."""
    out = tmp_path_factory.mktemp("built")
    found = {
        mode: moec.export(source, target="ort", precision="fp32", weights=mode, out=out / mode).path
        for mode in ("in-place", "copy", "pack")
    }
    return found | {"unbound": moec.export(SMALL, target="ort", out=out / "unbound").path}


def _found(folder: Path, written: Path) -> dict[str, str]:
    """What differs from the files that the exporter writes, without the graphs."""
    art = open_artefact(folder)
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir()
    write_genai(written / FOLDER, art.path / FOLDER, art.manifest, art.companion)
    return beside(art, written)


def _listed(folder: Path) -> None:
    """Let the manifest list every file of genai's folder, as whoever writes it can."""
    files = [each for each in (folder / FOLDER).rglob("*") if each.is_file()]
    small = [each for each in files if each.suffix != ".safetensors"]
    listed_again(folder, *(each.relative_to(folder).as_posix() for each in small))


def _spelled(change: Callable[[str], str]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / FILE
        file.write_text(change(file.read_text()))

    return damage


def _config(field: str, value: object) -> tuple[Damage, str]:
    return put(FILE, field, value), f"{FILE}: {field}"


def _option(name: str, value: object) -> tuple[Damage, str]:
    def change(config: dict[str, Any]) -> None:
        config["model"]["decoder"]["session_options"][name] = value

    return json_file(FILE, change), f"{FILE}: {OPTIONS}.{name}"


def _fetched(folder: Path) -> None:
    (folder / FOLDER / "more").mkdir()
    (folder / FOLDER / "more" / "adapter.onnx_adapter").write_bytes(b"x")


PLANTED: dict[str, tuple[Damage, str]] = {
    "a profile that overwrites a file": _option("enable_profiling", "/tmp/x"),
    "a library of operators": _option("custom_ops_library", "./x.so"),
    "an entry of ONNX Runtime": _option("session.collect_node_memory_stats_to_file", "/tmp/x"),
    "another folder of weights": _option(WEIGHTS, "../../evil"),
    "a provider": _config(f"{OPTIONS}.provider_options", [{"cuda": {}}]),
    "another log level": _config(f"{OPTIONS}.log_severity_level", 0),
    "another graph": _config("model.decoder.filename", "../model.onnx"),
    "another end token": _config("model.eos_token_id", [5]),
    "another first token": _config("model.bos_token_id", 5),
    "a true that counts as 1": _config("search.do_sample", 0),
    "sampling": _config("search.temperature", 0.5),
    "a field at the top": _config("engine", {"x": 1}),
    "fewer positions": _config("model.context_length", 8),
    "another type": _config("model.type", "llama"),
    "no search": (json_file(FILE, lambda config: config.pop("search")), f"{FILE}: search"),
    "a key twice": (
        _spelled(lambda said: said.replace('"type"', '"type": "llama", "type"')), FILE,
    ),
    "another spelling": (_spelled(lambda said: said.replace("\n", "\r\n")), FILE),
    "a list": (text(FILE, "[1]"), FILE),
    "no JSON": (text(FILE, "{"), FILE),
    "endless nesting": (text(FILE, "[" * 10**5), FILE),
    "too long": (text(FILE, " " * 2**21), FILE),
    "another tokenizer": (text(f"{FOLDER}/tokenizer.json", "{}"), f"{FOLDER}/tokenizer.json"),
    "tokenizer settings": (
        put(f"{FOLDER}/tokenizer_config.json", "eos_token", "x"), f"{FOLDER}/tokenizer_config.json",
    ),
    "a template": (
        text(f"{FOLDER}/chat_template.jinja", "x"), f"{FOLDER}/chat_template.jinja",
    ),
    "a further file": (text(f"{FOLDER}/special_tokens_map.json", "{}"),
                       f"{FOLDER}/special_tokens_map.json"),
    "a file in a folder": (_fetched, f"{FOLDER}/more/adapter.onnx_adapter"),
    "a file that is missing": (remove(f"{FOLDER}/tokenizer.json"), f"{FOLDER}/tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["copy", "in-place"])
@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_planted_is_named(
    kind: str, mode: str, built: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built[mode], tmp_path / "art"))
    plant, named = PLANTED[kind]
    plant(folder)
    if kind == "a file that is missing":
        json_file("manifest.json", lambda values: values["files"].pop(named))(folder)
    _listed(folder)
    ((file, what),) = _found(folder, tmp_path / "written").items()
    assert f"{file}: {what}".startswith(named)


def test_a_file_that_the_manifest_does_not_list_is_named(
    built: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built["copy"], tmp_path / "art"))
    (folder / FOLDER / "tokenizer.model").symlink_to("tokenizer.json")
    (folder / FOLDER / "empty").mkdir()
    json_file("manifest.json", lambda values: values["files"].pop(FILE))(folder)
    assert _found(folder, tmp_path / "written") == {
        FILE: "the manifest lists no such file",
        f"{FOLDER}/empty": "moec writes no such file",
        f"{FOLDER}/tokenizer.model": "moec writes no such file",
    }


@pytest.mark.parametrize("mode", ["in-place", "copy", "pack", "unbound"])
def test_a_sound_folder_passes_and_a_planted_one_fails(
    mode: str, built: dict[str, Path], tmp_path: Path
) -> None:
    (check,) = graph_files(open_artefact(built[mode]))
    assert check.passed and "cannot" not in check.detail
    folder = Path(shutil.copytree(built[mode], tmp_path / "art"))
    put(FILE, f"{OPTIONS}.log_severity_level", 0)(folder)
    _listed(folder)
    (check,) = graph_files(open_artefact(folder))
    assert not check.passed and check.name == f"{FILE}: {OPTIONS}.log_severity_level"
    assert check.detail == "0, expected 3"


def test_the_older_layout_passes(built: dict[str, Path], tmp_path: Path) -> None:
    folder = as_before(Path(shutil.copytree(built["copy"], tmp_path / "art")))
    (check,) = graph_files(open_artefact(folder))
    assert check.passed, check


def test_an_artefact_for_other_programs_has_no_such_folder(source: Path, tmp_path: Path) -> None:
    folder = moec.export(source, out=tmp_path / "art").path
    (folder / FOLDER).mkdir()
    (folder / FILE).write_text("{}")
    listed_again(folder, FILE)
    (check,) = graph_files(open_artefact(folder))
    assert not check.passed and check.name == FILE


def test_weights_in_place_after_a_move(built: dict[str, Path], tmp_path: Path) -> None:
    """The way to them leads nowhere: a remark. To other weights: the proof fails."""
    folder = tmp_path / "deep" / "er" / "art"
    shutil.copytree(built["in-place"], folder)
    artefact = open_artefact(folder)
    assert _found(folder, tmp_path / "written") == {}
    assert stale(artefact) and not stale(open_artefact(built["in-place"]))
    (check,) = graph_files(artefact)
    assert check.passed and "moec bind" in check.detail

    way = json.loads((folder / FILE).read_text())["model"]["decoder"]["session_options"][WEIGHTS]
    other = Path(os.path.normpath(folder / FOLDER / way))
    shutil.copytree(artefact.weights_folder, other)  # the same names and sizes, but not the weights
    ((file, what),) = _found(folder, tmp_path / "written").items()
    assert file == FILE and what.startswith(f"{OPTIONS}.{WEIGHTS}: {way!r}, expected ")
