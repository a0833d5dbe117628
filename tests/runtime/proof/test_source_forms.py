"""A source in another form than what the artefact was built from, or below an odd path."""

import shutil
from pathlib import Path

import pytest

import moec
from moec.artefact.artefact import open_artefact
from moec.artefact.parity import record
from moec.runtime.proof.source import weights_against_source
from moec.spec.scheme import Rule, Scheme
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint
from tests.families import CASES
from tests.refusals import refusal

LINEAR = ("layers.*.moe.gate_up", "layers.*.moe.down", "layers.*.attn.o.weight")
BLOCKS = Scheme(name="blocks", rules=(Rule(of=LINEAR, weight="block", inputs="group"),), block=8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model: wide, in FP8, in blocks of FP8, and artefacts of wide and of FP8 weights."""
    world = tmp_path_factory.mktemp("world")
    write_random_checkpoint(CASES["qwen3"], world / "wide", seed=3)
    moec.quantize(world / "wide", "dynamic", world / "fp8")
    moec.quantize(world / "wide", BLOCKS, world / "blocks")
    moec.export(world / "wide", "onnx", "fp32", world / "onnx-wide")
    moec.export(world / "wide", "ort", "fp32", world / "ort-wide")
    for target in ("onnx", "torch"):
        moec.export(world / "fp8", target, "fp8", world / f"{target}-fp8")
        moec.export(world / "wide", target, "fp8", world / f"{target}-made")
    return world


@pytest.mark.parametrize(
    ("artefact", "source", "found", "expected"),
    [
        ("onnx-fp8", "wide", "wide weights", "FP8 weights"),
        ("torch-fp8", "wide", "wide weights", "FP8 weights"),
        ("onnx-made", "fp8", "FP8 weights", "the wide weights that moec quantised"),
        ("torch-made", "fp8", "FP8 weights", "the wide weights that moec quantised"),
        ("torch-made", "torch-made", "FP8 weights", "the wide weights that moec quantised"),
        ("onnx-wide", "fp8", "FP8 weights", "wide weights"),
        ("ort-wide", "fp8", "FP8 weights", "wide weights"),
    ],
)
def test_it_is_refused_with_both_forms(
    artefact: str, source: str, found: str, expected: str, world: Path
) -> None:
    error = refusal(
        lambda: moec.validate(world / artefact, source=world / source), f"--source {world / source}"
    )
    assert found in error.found and expected in error.expected


def test_the_right_form_is_compared(world: Path) -> None:
    for artefact, source in (
        ("torch-fp8", "fp8"),
        ("torch-fp8", "torch-made"),
        ("onnx-made", "wide"),
    ):
        report = moec.validate(world / artefact, source=world / source, seed=1)
        weights = [check for check in report.checks if check.name.startswith("weights")]
        assert weights and all(check.passed for check in weights)


def test_fp8_of_another_scheme_is_a_difference_of_weights(world: Path) -> None:
    report = moec.validate(world / "onnx-fp8", source=world / "blocks", seed=1)
    failed = [check.name for check in report.checks if not check.passed]
    assert "FP8 scheme" in failed and any(name.startswith("weights") for name in failed)
    art = open_artefact(world / "onnx-fp8")
    assert not all(c.passed for c in weights_against_source(art, read_model(world / "blocks")[2]))


def test_a_report_that_names_a_path_which_is_not_utf8_is_stored(
    world: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(world / "wide", tmp_path / "odd\udcff"))
    (source / "tokenizer.json").write_text("{}")
    art = Path(shutil.copytree(world / "onnx-wide", tmp_path / "art"))
    (art / "tokenizer.json").write_text("[]")
    report = moec.validate(art, source=source, tokens=3)
    report.notes.append(f"merged into {source}")
    record(art, report)
    stored = open_artefact(art).manifest.parity
    assert stored and stored["notes"][-1].endswith("/odd\ufffd")
    assert any(each["detail"].endswith("/odd\ufffd") for each in stored["checks"])
