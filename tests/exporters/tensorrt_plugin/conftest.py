import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need triton")

from moec.exporters.tensorrt.plugin.build import Plugin, compile_plugin
from moec.kernels.launches.launch import SHARED
from moec.kernels.sizes import Sizes
from tests.exporters.tensorrt_plugin.launcher import CUDA_INCLUDE, compile_library

HERE = Path(__file__).parent
#: of the plugin library under test; the first has kernels for many tokens
SIZES = (Sizes(dim=256, hidden=128, experts=20), Sizes(dim=64, hidden=64, experts=2))
MOST = 600


@pytest.fixture(scope="session", autouse=True)
def compilers() -> None:
    if not shutil.which("g++") or not shutil.which("cc"):
        pytest.skip("needs C and C++ compilers")


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory, compilers: None) -> Plugin:
    out = tmp_path_factory.mktemp("plugin") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_INCLUDE", str(CUDA_INCLUDE))
        found = compile_plugin(SIZES, MOST, tuple(SHARED), out, HERE / "include")
    assert found.library, found.why
    return found


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory, compilers: None) -> Path:
    return compile_library(tmp_path_factory.mktemp("launcher") / "liblauncher.so")


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory, compilers: None) -> Path:
    """The folder with a libcuda.so.1 that writes down what it is asked for."""
    folder = tmp_path_factory.mktemp("fake")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wall", f"-I{CUDA_INCLUDE}", "-Wl,-soname,libcuda.so.1",
         HERE / "fake_driver.c", "-o", folder / "libcuda.so.1"],
        check=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def no_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a libcuda.so.1 that does not load, as if there were none."""
    folder = tmp_path_factory.mktemp("none")
    (folder / "libcuda.so.1").touch()
    return folder
