"""The library of a user: where it is, what its name stands for, and what is said without tools."""

import os
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import moec
from moec.cli import app
from moec.exporters.ort_library import build
from moec.exporters.ort_library.build import FACE, LIBRARY, cache_folder, key_of, own_library
from moec.kernels.ahead_of_time.operations import norm_fp8, rms_norm
from moec.kernels.launcher.build import PROGRAMS, SCRIPT, SOURCES, Library, sources_of
from moec.spec.errors import MoecError
from tests.kernels.launcher.reader import programs, read

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiler that does not optimise: these tests load no library."""
    compiler = tmp_path_factory.mktemp("compiler") / "quick"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    return compiler


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, quick: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CXX", str(quick))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/moec/libraries"


def test_all_sources_are_in_the_folder(library: Library) -> None:
    there = {each.name for each in files(FACE.package).iterdir()}
    sources = {name for name in there if name.endswith((".cpp", ".h"))}
    assert sources == {*FACE.sources, "check_api.cpp"}
    assert {path.name for path in library.folder.iterdir()} == {
        *SOURCES, *FACE.sources, PROGRAMS, SCRIPT, LIBRARY,
    }  # fmt: skip


def test_a_library_is_compiled_once_and_that_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX")  # as users have it
    caplog.set_level("INFO", "moec")
    operations = [norm_fp8(64, 1e-5)]
    found = own_library(operations, (90,))
    assert "about a minute" in caplog.text and not caplog.clear()
    assert found == cache / key_of(operations, (90,)) / LIBRARY and found.is_file()
    assert [each.name for each in cache.iterdir()] == [found.parent.name]  # no draft stays
    monkeypatch.setattr(build, "compile_library", None)
    assert own_library(operations, (90,)) == found and not caplog.text


def test_the_key_is_of_all_that_goes_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    one = [norm_fp8(64, 1e-5)]
    others = [norm_fp8(128, 1e-5)], [norm_fp8(64, 1e-6)], [rms_norm(64, 1e-5)]
    keys = [key_of(one, (90,)), key_of(one, (89,)), *(key_of(each, (90,)) for each in others)]
    assert key_of([norm_fp8(64, 1e-5)], (90,)) == keys[0]
    for changed in (
        {"sources_of": lambda face: {**sources_of(face), "library.cpp": b"another"}},
        {"version": lambda package: "another"},
        {"platform": SimpleNamespace(machine=lambda: "another", libc_ver=lambda: ("", ""))},
    ):
        with monkeypatch.context() as patch:
            for name, value in changed.items():
                patch.setattr(build, name, value)
            keys.append(key_of(one, (90,)))
    assert len(set(keys)) == len(keys) == 8


def _empty(library: Path) -> None:
    library.write_bytes(b"")


def _half(library: Path) -> None:
    content = library.read_bytes()
    library.write_bytes(content[: len(content) // 2])


def _writable(library: Path) -> None:
    library.chmod(0o666)


def _link(library: Path) -> None:
    library.rename(library.parent.parent / "elsewhere.so")
    library.symlink_to(library.parent.parent / "elsewhere.so")


@pytest.mark.parametrize("damage", [Path.unlink, _empty, _half, _writable, _link])
def test_a_damaged_library_is_compiled_again(damage: Callable[[Path], None], cache: Path) -> None:
    operations = [norm_fp8(64, 1e-5)]
    found = own_library(operations, (90,))
    content = found.read_bytes()
    damage(found)
    assert own_library(operations, (90,)) == found
    assert found.read_bytes() == content and not found.is_symlink()
    assert not found.stat().st_mode & 0o022


def test_without_a_compiler_it_is_one_message(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MoecError, match="no C\\+\\+ compiler no-such-compiler") as refused:
        own_library([norm_fp8(64, 1e-5)], (90,))
    assert refused.value.exit_code == 3 and not list(cache.iterdir())


@pytest.mark.parametrize("given", ["", "relative"])
def test_a_relative_cache_folder_is_ignored(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == Path.home() / ".cache/moec/libraries"


def test_the_api_and_the_example_fit_onnx_runtimes_header() -> None:
    root = os.environ.get("ONNXRUNTIME_ROOT")
    if not root:
        pytest.skip("needs ONNXRUNTIME_ROOT, the folder of ONNX Runtime's C++ package")
    check = str(files(FACE.package) / "check_api.cpp")
    example = Path(__file__).parents[3] / "examples/cpp/generate.cpp"
    for source in (check, example):
        command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        subprocess.run([*command, f"-I{root}/include", source], check=True)


def test_a_folder_for_programs_without_moec(tiny: Path, tmp_path: Path) -> None:
    art = moec.export(tiny, "ort", "fp8", out=tmp_path / "art", device="cuda").path
    found = CliRunner().invoke(app, ["library", str(art), "--sm", "sm90"])
    assert found.exit_code == 0, found.output
    folder = tmp_path / "art-library"
    assert str(folder / LIBRARY) in found.output.replace("\n", "")
    assert (folder / SCRIPT).is_file() and (folder / LIBRARY).is_file()
    content = (folder / PROGRAMS).read_bytes()
    names = {read(each).operation for each in programs(content)}
    assert {"norm_moe_norm_fp8", "attention_fp8", "fp8_linear", "norm_moe", "rms_norm"} <= names


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [("onnx", [], "target onnx"), ("ort-cuda", ["--sm", "new"], "such as SM90"),
     ("ort-cuda", ["--sm", "SM80"], "compute capabilities")],
)  # fmt: skip
def test_what_has_no_library(
    target: str, options: list[str], message: str, tiny: Path, tmp_path: Path
) -> None:
    art = moec.export(tiny, target, "fp8", out=tmp_path / "art").path
    found = CliRunner().invoke(app, ["library", str(art), *options])
    assert isinstance(found.exception, MoecError) and message in str(found.exception)
    assert not (tmp_path / "art-library").exists()


def _others(folder: Path) -> None:
    folder.mkdir()
    (folder / SCRIPT).write_text("precious")


def _pipe(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / "driver.h")


def _file(folder: Path) -> None:
    folder.write_text("precious")


@pytest.fixture(scope="module")
def artefact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moec.export(tiny, "ort-cuda", out=tmp_path_factory.mktemp("built") / "art").path


@pytest.mark.parametrize("there", [_others, _pipe, _file])
def test_what_is_not_ours_stays(
    there: Callable[[Path], None], artefact: Path, tmp_path: Path
) -> None:
    there(tmp_path / "out")
    with pytest.raises(MoecError, match="something else than a library"):
        moec.build_library(artefact, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    for each in (tmp_path / "out", tmp_path / "out" / SCRIPT):
        assert not each.is_file() or each.read_text() == "precious"


def test_a_library_is_written_anew_in_one_step(
    artefact: Path, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = moec.build_library(artefact, tmp_path / "out")
    assert found.library
    content = found.library.read_bytes()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(MoecError, match="stays") as refused:
        moec.build_library(artefact, tmp_path / "out")
    assert refused.value.exit_code == 3 and found.library.read_bytes() == content
    other = moec.build_library(artefact, tmp_path / "other")
    assert other.library is None and str(tmp_path / "other" / SCRIPT) in other.command
    monkeypatch.setenv("CXX", str(quick))
    (tmp_path / ".out.moec-partial-0").mkdir()  # left by a kill
    again = CliRunner().invoke(app, ["library", str(artefact), "--out", str(tmp_path / "out")])
    assert again.exit_code == 0 and found.library.is_file()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other", "out"]


def test_a_folder_in_the_artefact_is_refused(artefact: Path) -> None:
    before = sorted(artefact.iterdir())
    with pytest.raises(MoecError, match="a folder of the artefact"):
        moec.build_library(artefact, artefact / "library")
    assert sorted(artefact.iterdir()) == before


def test_the_folder_of_an_artefact_that_is_here(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(artefact)
    assert moec.build_library(".").folder == artefact.with_name("art-library")
