import shutil
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need triton")

from moec.exporters.tensorrt.plugin.build import Plugin, compile_plugin
from moec.kernels.launches.launch import SHARED
from tests.kernels.launcher.expected import MOST, SIZES
from tests.kernels.launcher.launcher import CUDA_INCLUDE, compile_driver

HERE = Path(__file__).parent


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
def fake(tmp_path_factory: pytest.TempPathFactory, compilers: None) -> Path:
    """The folder with a driver that writes down what it is asked for."""
    return compile_driver(tmp_path_factory.mktemp("fake"))
