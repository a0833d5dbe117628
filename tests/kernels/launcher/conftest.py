import shutil
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need triton")

from tests.kernels.launcher.launcher import compile_driver, compile_library

HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def compilers() -> None:
    if not shutil.which("g++") or not shutil.which("cc"):
        pytest.skip("needs C and C++ compilers")


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory, compilers: None) -> Path:
    return compile_library(tmp_path_factory.mktemp("launcher") / "liblauncher.so")


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory, compilers: None) -> Path:
    return compile_driver(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="session")
def no_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a libcuda.so.1 that does not load, as if there were none."""
    folder = tmp_path_factory.mktemp("none")
    (folder / "libcuda.so.1").touch()
    return folder
