"""The C++ example on a GPU: the tokens that the Python session chooses, in ONNX Runtime alone."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

import moec
from moec.artefact.artefact import open_artefact
from moec.exporters.ort_library.build import LIBRARY

SOURCE = Path(__file__).parents[2] / "examples" / "cpp" / "generate.cpp"


@pytest.fixture(scope="module")
def generate(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the example, compiled against ONNX Runtime's C++ package."""
    root = os.environ.get("ONNXRUNTIME_ROOT")
    if not root:
        pytest.skip("needs ONNXRUNTIME_ROOT, the folder of onnxruntime-gpu's C++ package")
    program = tmp_path_factory.mktemp("example") / "generate"
    command = ["g++", "-std=c++17", "-O2", str(SOURCE), f"-I{root}/include"]
    link = [f"-L{root}/lib", "-lonnxruntime", f"-Wl,-rpath,{root}/lib"]
    subprocess.run([*command, *link, "-o", str(program)], check=True)
    return [str(program)]


@pytest.fixture(scope="module")
def built(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "art"
    return moec.export(tiny, target="ort-cuda", precision="fp8", out=out).path


def run(command: list[str], *given: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *map(str, given)], capture_output=True, text=True, timeout=120)


def test_it_prints_the_tokens_of_the_session(generate: list[str], built: Path) -> None:
    """A prompt across two chunk borders, and steps across the next."""
    library = moec.build_library(built).folder / LIBRARY
    chunk = open_artefact(built).manifest.spec.text.chunk
    session = moec.open_session(built, device="cuda")
    prompt = torch.randint(0, 4096, (1, 2 * chunk + 90))
    expected = session.generate(prompt, max_new_tokens=60, stop=())[0].tolist()
    found = run(generate, built / "model.onnx", library, chunk, 60, *prompt[0].tolist())
    assert found.returncode == 0, found.stderr
    assert list(map(int, found.stdout.split())) == expected


def test_what_it_refuses(generate: list[str], built: Path, tmp_path: Path) -> None:
    """A missing library, and the library of another model."""
    missing = run(generate, built / "model.onnx", tmp_path / LIBRARY, 128, 4, 1)
    assert missing.returncode == 1 and LIBRARY in missing.stderr, missing.stderr
    other = moec.export("scout", target="ort-cuda", precision="fp8", out=tmp_path / "a").path
    library = moec.build_library(other).folder / LIBRARY
    wrong = run(generate, built / "model.onnx", library, 128, 4, 1)
    assert wrong.returncode == 1 and "no program for" in wrong.stderr, wrong.stderr
