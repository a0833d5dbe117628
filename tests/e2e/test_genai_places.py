"""onnxruntime-genai opens an artefact wherever people put one: odd names, caches, read-only."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moec
from moec.artefact.artefact import open_artefact, verify_files
from moec.exporters.onnx.genai import CONFIG, FOLDER, WEIGHTS
from tests.artefact.opening.test_weights_from import to_cache
from tests.old_genai import as_before
from tests.small import small_with_tokenizer

og = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")

PROMPT = [7, 8, 9]
#: accents, spaces, what JSON escapes, and what looks like an escape
ODD = 'Möbel und 日本 😀 "x" \\u0041 \\n \t \x01'
#: root may write anywhere with these capabilities, and nowhere without them
UNPRIVILEGED = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
CHILD = """
import sys, onnxruntime_genai as og
model = og.Model(sys.argv[1])
assert len(og.Tokenizer(model).encode("hi"))
try:
    open(sys.argv[1] + "/x", "w")
except PermissionError:
    print("opened, and cannot write")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    return small_with_tokenizer(tmp_path_factory.mktemp("source") / "checkpoint")


def _next(folder: Path) -> int:
    """The token that genai generates after the prompt."""
    params = og.GeneratorParams(og.Model(str(folder / FOLDER)))
    params.set_search_options(max_length=len(PROMPT) + 1, do_sample=False)
    generator = og.Generator(og.Model(str(folder / FOLDER)), params)
    generator.append_tokens(PROMPT)
    generator.generate_next_token()
    return int(generator.get_sequence(0)[-1])


def _expected(folder: Path) -> int:
    return int(moec.open_session(folder).generate([PROMPT], max_new_tokens=1)[0][-1])


@pytest.mark.parametrize("mode", ["copy", "link", "pack"])
def test_it_opens_in_any_folder_and_from_a_cache(mode: str, source: Path, tmp_path: Path) -> None:
    built = moec.export(source, target="ort", precision="fp32", weights=mode, out=tmp_path / "a")
    moved = tmp_path / ODD / "x y"
    moved.parent.mkdir()
    built.path.rename(moved)
    expected = _expected(moved)
    for folder in (moved, to_cache(moved, tmp_path / "hub é")):
        assert _next(folder) == expected == _expected(folder)
        artefact = open_artefact(folder)
        assert all(name.startswith("genai/") for name in artefact.manifest.weights.shards)
        hashed = set(verify_files(artefact).hashed)
        assert mode == "link" or artefact.manifest.weights.shards.keys() <= hashed


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "hub cache"])
def test_weights_in_place_are_found_by_any_name(cached: bool, source: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / ODD / "checkpoint"
    if cached:
        checkpoint = to_cache(source, tmp_path / ODD)
    else:
        shutil.copytree(source, checkpoint)
    built = moec.export(checkpoint, target="ort", precision="fp32", out=tmp_path / "art ü")
    assert built.manifest.weights.mode == "in-place"
    assert _next(built.path) == _expected(built.path)


@pytest.fixture
def read_only(source: Path, tmp_path: Path) -> Iterator[Path]:
    built = moec.export(
        source, target="ort", precision="fp32", weights="pack", out=tmp_path / "art"
    )
    snapshot = to_cache(built.path, tmp_path / "hub")
    folders = [each for each in (tmp_path / "hub").rglob("*") if not each.is_symlink()]
    for each in folders:
        each.chmod(0o555)
    yield snapshot
    for each in folders:
        each.chmod(0o755)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
def test_a_read_only_folder_is_opened_and_not_written(source: Path, read_only: Path) -> None:
    child = [*UNPRIVILEGED, sys.executable, "-c", CHILD, str(read_only / FOLDER)]
    done = subprocess.run(child, capture_output=True, text=True)
    assert done.stdout == "opened, and cannot write\n", done.stderr


def test_an_artefact_with_weights_beside_the_models_still_opens(
    source: Path, tmp_path: Path
) -> None:
    built = moec.export(source, target="ort", precision="fp32", weights="copy", out=tmp_path / "a")
    expected = _expected(built.path)
    old = as_before(built.path)
    assert list(open_artefact(old).manifest.weights.shards) == ["model.safetensors"]
    assert WEIGHTS in (old / FOLDER / CONFIG).read_text()
    assert _next(old) == expected == _expected(old)
    assert "model.safetensors" in verify_files(open_artefact(old)).hashed
    anew = moec.bind(old, source, weights="copy")
    assert list(anew.manifest.weights.shards) == ["genai/model.safetensors"]
    assert _next(anew.path) == expected == _expected(anew.path)
