import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need triton")

from moec.exporters.ort_library.build import FACE, compile_library
from moec.kernels.ahead_of_time import operations
from moec.kernels.launcher.build import Library
from moec.kernels.sizes import Heads, constants_text
from tests.kernels.launcher.launcher import CUDA_INCLUDE, compile_driver

EPS = 1e-5
#: the operations of the library under test and their constants, by a name
OPERATIONS = {
    name: (each, constants_text(each.constants))
    for name, each in {
        "linear": operations.fp8_linear(128, 128),
        "wide": operations.fp8_linear(256, 128),
        "norm": operations.norm_fp8(128, EPS),
        "attention": operations.attention_fp8(Heads(8, 8, 16), True, False, EPS),
        "global": operations.attention_fp8(Heads(8, 8, 16), False, True, None),
    }.items()
}


@pytest.fixture(scope="session", autouse=True)
def compilers() -> None:
    if not shutil.which("g++") or not shutil.which("cc"):
        pytest.skip("needs C and C++ compilers")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory, compilers: None) -> Library:
    out = tmp_path_factory.mktemp("library") / "out"
    found = compile_library([each for each, _ in OPERATIONS.values()], (90,), out)
    assert found.library, found.why
    return found


@pytest.fixture(scope="session")
def on_cpu(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with its nodes on ONNX Runtime's CPU provider."""
    out = tmp_path_factory.mktemp("on_cpu") / FACE.library
    sources = [each for each in library.folder.iterdir() if each.suffix in (".cpp", ".S")]
    provider = '-DMOEC_PROVIDER="CPUExecutionProvider"'
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
         "-Werror", provider, f"-I{CUDA_INCLUDE}", *sources, "-ldl", "-o", out],
        check=True, cwd=library.folder,
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory, compilers: None) -> Path:
    """The folder with a driver that writes down what it is asked for."""
    return compile_driver(tmp_path_factory.mktemp("fake"))
