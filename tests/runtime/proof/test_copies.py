"""A config.json beside a checkpoint's own weights makes an artefact a checkpoint for others too."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import moec
from moec.artefact.artefact import open_artefact
from moec.runtime.proof.published import published_folder
from moec.runtime.proof.report import Check
from moec.spec.hf.forms import INDEX
from tests import damage

CONFIG, GENERATION, SINGLE = "config.json", "generation_config.json", "model.safetensors"


def _built(checkpoint: Path, folder: Path, target: str, weights: str, **more: Any) -> Path:
    return moec.export(checkpoint, target, "fp32", folder, weights=weights, **more).path


def _checks(art: Path, source: Path | None = None) -> list[Check]:
    return list(published_folder(open_artefact(art), source))


def _failure(art: Path, source: Path | None = None) -> str:
    (check,) = _checks(art, source)
    assert check.name == "as a checkpoint" and not check.passed
    return check.detail


def _say(art: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of an artefact, as whoever passes it on can."""
    if not (art / name).exists():
        (art / name).write_text("{}")
    damage.json_file(name, change)(art)
    damage.listed_again(art, name)


def _theta(config: dict[str, Any]) -> None:
    config["rope_theta"] = 10.0


@pytest.fixture(scope="module")
def copied(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built(checkpoint, tmp_path_factory.mktemp("copied") / "art", "onnx", "copy")


@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("weights", ["copy", "link"])
def test_another_model_in_a_config_is_named(
    target: str, weights: str, checkpoint: Path, tmp_path: Path
) -> None:
    art = _built(checkpoint, tmp_path / "art", target, weights)
    for source in (None, checkpoint):
        (check,) = _checks(art, source)
        assert check.passed, check.detail
    _say(art, CONFIG, _theta)
    (check, *_) = _checks(art)
    assert not check.passed and "theta: 10" in check.detail


def test_the_proof_of_such_an_artefact_fails(
    copied: Path, checkpoint: Path, tmp_path: Path
) -> None:
    art = shutil.copytree(copied, tmp_path / "art")
    assert moec.validate(art, source=checkpoint, tokens=4, seed=1).passed
    _say(art, CONFIG, _theta)
    for more in ({"source": checkpoint}, {}, {"reduced": True}):
        report = moec.validate(art, tokens=4, seed=1, **more)
        assert not report.passed
        assert {check.name for check in report.checks if not check.passed} == {"as a checkpoint"}


@pytest.mark.parametrize(
    ("name", "change", "alone"),
    [
        (CONFIG, lambda c: c.update(rms_norm_eps=0.5), True),
        (CONFIG, lambda c: c.update(model_type="other"), True),
        (CONFIG, lambda c: c.update(num_hidden_layers=1), True),
        (GENERATION, lambda c: c.update(eos_token_id=[3]), True),
        (CONFIG, lambda c: c.update(architectures=["Other"]), False),
        (GENERATION, lambda c: c.update(x=1), False),
    ],
)
def test_fields_of_a_copied_config(
    name: str,
    change: Callable[[dict[str, Any]], object],
    alone: bool,
    copied: Path,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    """Those that moec does not read are compared with the source's."""
    art = shutil.copytree(copied, tmp_path / "art")
    _say(art, name, change)
    assert all(check.passed for check in _checks(art)) is not alone
    assert not all(check.passed for check in _checks(art, checkpoint))


def test_a_config_beside_linked_weights_of_another_folder(checkpoint: Path, tmp_path: Path) -> None:
    """Weights in place leave no config.json; whoever adds one makes a checkpoint of the folder."""
    art = _built(checkpoint, tmp_path / "art", "onnx", "in-place")
    assert not _checks(art)
    (art / SINGLE).symlink_to(checkpoint / SINGLE)
    shutil.copy(checkpoint / CONFIG, art)
    (check,) = _checks(art)
    assert check.passed
    damage.json_file(CONFIG, _theta)(art)
    assert "theta" in _failure(art)


def test_packed_weights_have_no_name_of_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """A file may have tensors that the artefact does not read, with the names of other engines."""
    art = moec.export(checkpoint, "torch", "bf16", tmp_path / "art").path
    assert not _checks(art)
    (art / "weights.safetensors").rename(art / SINGLE)
    path = art / "manifest.json"
    path.write_text(path.read_text().replace('"weights.safetensors"', f'"{SINGLE}"'))
    damage.sealed(art)
    assert SINGLE in _failure(art)


def test_a_checkpoint_beside_a_graph_without_weights(checkpoint: Path, tmp_path: Path) -> None:
    art = moec.export(moec.load_spec(checkpoint), "onnx", "fp32", tmp_path / "art").path
    assert not _checks(art)
    for name in (CONFIG, SINGLE):
        shutil.copy(checkpoint / name, art)
    assert SINGLE in _failure(art)


def test_shards_that_only_an_index_names(checkpoint: Path, tmp_path: Path) -> None:
    """A build copies no index. The shards count together, whatever their names are."""
    source = shutil.copytree(checkpoint, tmp_path / "source")
    tensors = load_file(source / SINGLE)
    names = sorted(tensors)
    parts = {SINGLE: names[:5], "more.safetensors": names[5:]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, source / name)
    listed = {key: name for name, keys in parts.items() for key in keys}
    (source / INDEX).write_text(json.dumps({"weight_map": listed}))
    art = _built(source / INDEX, tmp_path / "art", "onnx", "copy")
    (check,) = _checks(art, source)
    assert check.passed, check.detail
    _say(art, CONFIG, _theta)
    assert "theta" in _failure(art)
