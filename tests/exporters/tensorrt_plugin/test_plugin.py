"""The plugin as TensorRT calls it, without TensorRT."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from moec.exporters.tensorrt.plugin.build import Plugin
from tests.exporters.tensorrt_plugin.conftest import HERE
from tests.kernels.launcher.expected import SIZES

pytestmark = pytest.mark.full


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory, fake: Path) -> Path:
    out = tmp_path_factory.mktemp("harness") / "harness"
    subprocess.run(
        ["g++", "-std=c++17", "-Wall", "-Werror", f"-I{HERE / 'include'}", HERE / "harness.cpp",
         "-Wl,--no-as-needed", fake / "libcuda.so.1", "-ldl", "-o", out],
        check=True,
    )  # fmt: skip
    return out


def play(harness: Path, plugin: Plugin, driver: Path, case: str, log: Path, cc: int = 90) -> str:
    assert plugin.library
    done = subprocess.run(
        [harness, plugin.library, case], capture_output=True, text=True,
        env={
            **os.environ, "LD_LIBRARY_PATH": str(driver), "FAKE_LOG": str(log),
            "FAKE_CC": str(cc),
        },
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def test_from_model_to_launches(harness: Path, plugin: Plugin, fake: Path, tmp_path: Path) -> None:
    said = play(harness, plugin, fake, "all", tmp_path / "log").splitlines()
    assert said[:5] == [
        "creators 1 PLUGIN CREATOR_V3ONE MoecMoe 1 moec fields 0",
        "core MoecMoe 1 moec outputs 1",
        "types 0 -> 7",
        "supported 7 others 0",
        "configured 0",
    ]
    assert int(said[5].removeprefix("workspace ")) > 0
    assert said[6:] == [
        "build shapes 0",
        f"field sha256 {plugin.programs[SIZES[0]]}", "read 1", "shapes 0", "ran 0",
    ]  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    launches = [each for each in log if "launch" in each]
    assert [each["launch"] for each in launches] == [
        "route", "gate_up", "encode", "down", "combine",
    ]  # fmt: skip
    assert {each["stream"] for each in launches} == {0x570}
    assert launches[0]["grid"] == [20, 21, 1]


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("dtype", ("types 1", "input gate_up: found type 2, expected FLOAT8E4M3FN")),
        ("count", ("configured 1", "inputs: found 5, expected 6")),
        ("shape", ("configured 1", "input down_scale: found [21, 255], expected [21, 256]")),
        ("rank", ("configured 1", "input down: found [21, 256], expected [21, 256, 128]")),
        ("sizes", (
            "configured 1", "no program for x [T, 256], router [21, 256], gate_up [22, 256, 256]",
            "expected moe_layer, x bf16 [tokens, 256], router bf16 [20, 256]",
            "; or moe_layer, x bf16 [tokens, 64]",
        )),
        ("sha", ("read 0", f"expected {'a' * 64}", "the engine's own library")),
        ("no fields", ("read 0", "no program's SHA-256", "build it again")),
        ("changed", (
            "shapes 1", "found moe_layer, x bf16 [tokens, 64]",
            "expected moe_layer, x bf16 [tokens, 256]",
        )),
    ],
)  # fmt: skip
def test_refusals_go_to_the_logger(
    harness: Path, plugin: Plugin, fake: Path, tmp_path: Path, case: str, parts: tuple[str, ...]
) -> None:
    said = play(harness, plugin, fake, case, tmp_path / "log")
    assert all(part in said for part in parts), said
    assert "said 1: MoecMoe: " in said


def test_a_gpu_without_kernels(harness: Path, plugin: Plugin, fake: Path, tmp_path: Path) -> None:
    said = play(harness, plugin, fake, "all", tmp_path / "log", cc=100)
    assert "build shapes 0" in said and "read 1" in said
    assert "shapes 1\n" in said and "ran 1\n" in said
    assert "this GPU: found compute capability 100, expected 89, 90, 120" in said


def test_without_a_logger_it_is_stderr(
    harness: Path, plugin: Plugin, fake: Path, tmp_path: Path
) -> None:
    said = play(harness, plugin, fake, "stderr", tmp_path / "log")
    assert "MoecMoe: input gate_up: found" in said and "said" not in said


def test_nothing_of_cuda_or_tensorrt_is_linked(plugin: Plugin) -> None:
    assert plugin.library
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", plugin.library], capture_output=True, text=True, check=True
    ).stdout
    assert not [line for line in listed.split() if line.startswith(("cu", "_ZN8nvinfer1"))]
    needed = subprocess.run(
        ["readelf", "-d", plugin.library], capture_output=True, text=True, check=True
    ).stdout
    assert "libcuda" not in needed and "nvinfer" not in needed
