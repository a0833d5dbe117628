"""Programs of target torch: no weights, no device, any sizes; and what the target does not take."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.artefact.artefact import open_artefact, verify_files
from moec.runtime.engines.weights import load
from moec.spec.scheme import SCHEMES
from moec.weights.joined import FUSED
from moec.weights.name_map import read_model
from moec.weights.packed.journal import PACKED
from moec.weights.random import write_random_checkpoint
from moec.weights.view import view
from tests.refusals import refusal


@pytest.mark.slow
def test_scout_builds_without_weights(tmp_path: Path) -> None:
    art = moec.export("scout", target="torch", out=tmp_path / "art")
    manifest = art.manifest
    assert (manifest.precision, manifest.compute, manifest.dialect) == ("fp8", "bf16", "torch")
    assert manifest.spec.scheme == SCHEMES["dynamic"] and manifest.opset is None
    assert set(manifest.files) == {"model.pt2", "vision.pt2"} and manifest.buffered
    assert manifest.build.bytes_written < 3e6
    assert sum(manifest.build.seconds.values()) < 60
    ports = {port.name: port for port in manifest.inputs}
    assert ports["past.3.key"].shape == ("batch", 8, "global_slots", 128)
    assert ports["ring.total"].shape == () and "lengths" not in ports
    assert [port.name for port in manifest.outputs] == ["logits"]
    assert manifest.vision and manifest.vision.inputs[0].name == "pixel_values"
    verify_files(open_artefact(art.path))


@pytest.fixture(scope="module")
def bound(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moec.export(tiny, target="torch", out=tmp_path_factory.mktemp("torch") / "art").path


@pytest.mark.parametrize("part", ["model", "vision"])
def test_a_program_holds_ops_alone(bound: Path, part: str) -> None:
    file = bound / f"{part}.pt2"
    with zipfile.ZipFile(file) as archive:
        inner = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    assert not any(name.startswith("data/weights/weight_") for name in inner)
    program = torch.export.load(file)
    assert not program.state_dict and not program.constants
    nodes = list(program.graph.nodes)
    calls = [node for node in nodes if node.op == "call_function"]
    kinds = {getattr(node.target, "namespace", node.target.__name__) for node in calls}
    assert kinds == {"moec", "getitem"}
    assert not any(isinstance(arg, torch.device) for n in calls for arg in (*n.args, *n.kwargs))


@pytest.mark.slow
def test_binding_later_is_building_with_weights(tiny: Path, bound: Path, tmp_path: Path) -> None:
    moec.export(moec.load_spec(tiny), target="torch", out=tmp_path / "art")
    art = moec.bind(tmp_path / "art", tiny)
    assert (art.path / PACKED).read_bytes() == (bound / PACKED).read_bytes()
    whole = open_artefact(bound)
    ids = torch.arange(3, 40)[None]
    found, expected = (moec.open_session(a.path).logits(ids) for a in (art, whole))
    assert torch.equal(found, expected)
    anew = moec.bind(art.path, tiny, tmp_path / "anew")
    assert (anew.path / "model.pt2").read_bytes() == (art.path / "model.pt2").read_bytes()
    assert anew.manifest.inputs == whole.manifest.inputs
    verify_files(open_artefact(anew.path))


def test_float32_checkpoints_are_stored_as_bf16(tmp_path: Path) -> None:
    spec = moec.load_spec("tiny-scout").model_copy(update={"dtype": "fp32", "scheme": None})
    write_random_checkpoint(spec, tmp_path / "weights")
    art = moec.export(tmp_path / "weights", target="torch", out=tmp_path / "art")
    assert art.stored()["norm.weight.bf16"].dtype == "bf16"
    weights = load(art)
    _, _, entries = read_model(tmp_path / "weights")
    for name in ("norm.weight", "layers.1.moe.router.weight"):
        assert torch.equal(weights[name], view(entries[name]).bfloat16())
    session = moec.open_session(art.path)
    assert session.logits(torch.arange(3, 40)[None]).isfinite().all()


@pytest.mark.parametrize(
    "choice, says",
    [
        *(({"precision": p}, f"--precision {p} --target torch") for p in ("int8", "int4")),
        *(({"scheme": s}, f"scheme {s}") for s in ("meta", "modelopt", "deepseek")),
        ({"cache": "fp8"}, "cache"),
        ({"weights": "copy"}, "--weights copy"),
    ],
    ids=str,
)
def test_what_the_target_does_not_take_is_refused(
    sound: Path, tmp_path: Path, choice: dict[str, Any], says: str
) -> None:
    out = tmp_path / "art"
    error = refusal(lambda: moec.export(sound, target="torch", out=out, **choice), says)
    assert not out.exists()
    if "precision" in choice:
        assert "use --precision fp8" in str(error)


def test_wide_weights_run_in_plain_torch(sound: Path, tmp_path: Path) -> None:
    """A model that has fused ops in FP8 has a plain program in the other precisions."""
    art = moec.export(sound, target="torch", precision="bf16", out=tmp_path / "art")
    assert (art.manifest.dialect, art.manifest.compute) == ("torch-plain", "bf16")
    weights, (_, _, entries) = load(art), read_model(sound)
    down = view(entries["layers.1.moe.down"]).transpose(1, 2)
    shared = view(entries["layers.1.moe.shared.down.weight"])
    assert torch.equal(weights["layers.1.moe.down"], torch.cat([down, shared[None]]).bfloat16())
    ids = torch.arange(3, 40)[None]
    found, expected = (
        moec.open_session(art.path, engine=engine).logits(ids)[0] for engine in ("torch", "eager")
    )
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.02


def test_other_fp8_checkpoints_are_refused(tmp_path: Path) -> None:
    scheme = SCHEMES["meta"].model_copy(update={"layout": "fbgemm_fp8", "bound": 1200.0})
    spec = moec.load_spec("tiny-scout").model_copy(update={"scheme": scheme})
    write_random_checkpoint(spec, tmp_path / "weights")
    refusal(lambda: moec.export(tmp_path / "weights", target="torch", out=tmp_path / "a"), "layout")


@pytest.mark.parametrize("scales", ["fp32", "bf16"])
def test_experts_apart_are_joined_while_they_are_loaded(scales: str, tmp_path: Path) -> None:
    """A checkpoint in compressed-tensors form stays in place, and runs as what moec packs."""
    layout = {"layout": "compressed-tensors", "scales": scales}
    scheme = SCHEMES["dynamic"].model_copy(update=layout)
    spec = moec.load_spec("tiny-scout").model_copy(update={"scheme": scheme, "dtype": "bf16"})
    write_random_checkpoint(spec, tmp_path / "apart", seed=3)
    art = moec.export(tmp_path / "apart", target="torch", out=tmp_path / "art")
    assert (art.manifest.weights.mode, art.manifest.dialect) == ("in-place", FUSED)
    assert art.manifest.build.bytes_packed == 0
    found, stored = load(art), art.stored()
    assert found["layers.1.moe.gate_up_scale"].dtype == torch.float32
    assert len(found["layers.1.moe.gate_up"]) == spec.text.expert_count + 1
    for at, part in ((0, "gate"), (1, "up")):
        for kind in ("", "_scale"):
            joined = found[f"layers.1.moe.gate_up{kind}"][2].float().chunk(2)[at]
            own = view(stored[f"layers.1.moe.experts.2.{part}.weight{kind}"]).float()
            assert torch.equal(joined, own.view(joined.shape))
