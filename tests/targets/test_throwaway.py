"""A target is one new folder: no line elsewhere knows of this one, and every command takes it."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moec
import moec.targets
from moec.artefact.choices import choose
from moec.artefact.targets import find_target, targets
from moec.cli import app
from moec.exporters.builder import builder_of
from moec.runtime.open import engines
from moec.spec.errors import MoecError
from tests.refusals import refusal

FOLDER = Path(__file__).parent / "throwaway"


@pytest.fixture
def throwaway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The folder, copied to where targets are looked for."""
    shutil.copytree(FOLDER, tmp_path / "targets" / "throwaway")
    monkeypatch.setattr(moec.targets, "__path__", [*moec.targets.__path__, f"{tmp_path}/targets"])
    targets.cache_clear()
    yield "throwaway"
    targets.cache_clear()
    for name in [name for name in sys.modules if name.startswith("moec.targets.throwaway")]:
        del sys.modules[name]


def test_it_builds_binds_runs_and_is_proven(throwaway: str, tiny: Path, tmp_path: Path) -> None:
    unbound = moec.export(moec.load_spec(tiny), target=throwaway, out=tmp_path / "unbound")
    assert moec.validate(unbound.path).twin
    bound = moec.bind(unbound.path, tiny, out=tmp_path / "bound")
    assert (bound.path / "model.spec").is_file() and bound.manifest.precision == "fp32"
    session = moec.open_session(bound.path)
    assert session.engine == throwaway
    wanted = moec.open_session(tiny).generate([[5, 6, 7]], max_new_tokens=4)
    assert (session.generate([[5, 6, 7]], max_new_tokens=4) == wanted).all()
    report = moec.validate(bound.path)
    assert report.passed and report.engine == throwaway, report.to_dict()


@pytest.mark.slow
def test_the_command_line_takes_it(throwaway: str, tiny: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "art")
    words = ["build", "--checkpoint", str(tiny), "--target", throwaway, "--out", out]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert CliRunner().invoke(app, ["inspect", out, "--verify"]).exit_code == 0


def test_its_refusals_are_asked_for(throwaway: str, tmp_path: Path) -> None:
    refusal(lambda: moec.export("maverick", target=throwaway, out=tmp_path / "a"), "experts")
    refusal(
        lambda: moec.export("tiny-scout", target=throwaway, precision="fp16", out=tmp_path / "a"),
        "--precision fp16",
    )
    assert throwaway in engines()


def test_without_the_folder_its_artefacts_are_refused(tiny: Path, tmp_path: Path) -> None:
    refusal(lambda: moec.export(tiny, target="throwaway", out=tmp_path / "a"), "--target throwaway")


@pytest.mark.parametrize("name", targets())
def test_a_record_says_all(name: str) -> None:
    """Every dialect that a record names is one that its builder knows; its engines exist."""
    target, builder = find_target(name), builder_of(name)
    for precision, row in target.precisions.items():
        assert {row.stays, row.packed} - {None} <= set(builder.dialects), precision
        if row.given:  # only for a checkpoint that has it already
            continue
        mode = "in-place" if row.stays else "pack"
        assert choose(target, precision, None)[1] == mode
    assert set(target.reduced) <= set(builder.dialects)
    assert {target.engine, *target.proofs.values()} <= target.engines.keys()
    assert set(target.engines) <= set(engines())


def test_sizes_of_reduced_models_are_those_of_blocks_and_kernels() -> None:
    from moec.exporters.onnx.experts.ort import BLOCK
    from moec.kernels.sizes import SMALLEST

    assert find_target("ort").reduced["ort-int4"] == {"block": BLOCK}
    assert find_target("tensorrt").reduced["tensorrt-plugin"] == {"block": SMALLEST}


def test_no_such_target_is_one_message() -> None:
    with pytest.raises(MoecError) as caught:
        find_target("tpu")
    assert caught.value.where == "--target tpu" and "onnx" in caught.value.expected
