"""The folder of a plugin: what is in it, and what is said where it cannot be compiled."""

import os
import shutil
import subprocess
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest

from moec.exporters.tensorrt import preload
from moec.exporters.tensorrt.plugin.build import FACE, LIBRARY, Plugin, compile_plugin
from moec.kernels.launcher.build import PROGRAMS, SCRIPT, SOURCES
from moec.kernels.sizes import Sizes
from moec.spec.errors import MoecError
from tests.exporters.tensorrt_plugin.conftest import HERE
from tests.kernels.launcher.expected import SIZES
from tests.kernels.launcher.launcher import CUDA_INCLUDE

pytestmark = pytest.mark.full

TINY = Sizes(dim=64, hidden=64, experts=2)


def compiled(out: Path, include: Path) -> Plugin:
    return compile_plugin([TINY], 8, [89], out, include)


def test_all_sources_are_in_it(plugin: Plugin) -> None:
    for package, sources in (("moec.kernels.launcher", SOURCES), (FACE.package, FACE.sources)):
        there = {each.name for each in files(package).iterdir()}
        assert {name for name in there if name.endswith((".cpp", ".h", ".S"))} == set(sources)
    assert {path.name for path in plugin.folder.iterdir()} == {
        *SOURCES, *FACE.sources, PROGRAMS, SCRIPT, LIBRARY,
    }  # fmt: skip
    assert list(plugin.programs) == list(SIZES) and not plugin.why


def test_the_command_compiles_it(plugin: Plugin, tmp_path: Path) -> None:
    copy = tmp_path / "a copy"
    shutil.copytree(plugin.folder, copy)
    (copy / LIBRARY).unlink()
    command = plugin.command.replace(str(plugin.folder), f"'{copy}'")
    subprocess.run(["sh", "-c", command], check=True, cwd="/")
    assert (copy / LIBRARY).is_file()


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (None, "no NvInferRuntime.h in {include}"),
        pytest.param("#error moec", "failed", marks=pytest.mark.slow),
    ],
)
def test_headers_that_do_not_serve(tmp_path: Path, header: str | None, why: str) -> None:
    include = tmp_path / "include"
    include.mkdir()
    if header:
        (include / "NvInferRuntime.h").write_text(header + "\n")
    found = compiled(tmp_path / "out", include)
    assert found.library is None and why.format(include=include) in found.why
    assert "TENSORRT_INCLUDE=" in found.command and SCRIPT in found.command
    assert (found.folder / SCRIPT).is_file() and not (found.folder / LIBRARY).exists()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = compiled(tmp_path, HERE / "include")
    assert found.library is None and "no C++ compiler no-such-compiler" in found.why


@pytest.mark.slow
def test_headers_by_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE", str(HERE / "include"))
    monkeypatch.setenv("CUDA_INCLUDE", str(CUDA_INCLUDE))
    found = compile_plugin([TINY, TINY], 8, [89], tmp_path)
    assert found.library == tmp_path / LIBRARY and list(found.programs) == [TINY]


def test_no_c_compiler_for_the_preload(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("tensorrt_rtx_libs") is None:
        pytest.skip("needs TensorRT-RTX")
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(MoecError, match="no C compiler") as refused:
        preload.preload.__wrapped__()
    assert refused.value.exit_code == 3


def test_no_tensorrt_rtx_for_the_preload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "find_spec", lambda name: None)
    with pytest.raises(MoecError, match=r"libtensorrt_rtx.so.1") as refused:
        preload.preload.__wrapped__()
    assert refused.value.exit_code == 3
