"""Wide experts stored one by one, [out, in], as quantisers leave them, against the fused model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moec
from moec.artefact.engine_options import EngineOptions
from moec.spec.model import ModelSpec
from moec.spec.scheme import SCHEMES, Rule
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint
from tests.oracle import assert_rows_agree, transformers_logits
from tests.proofs import assert_passed
from tests.small import SMALL

pytestmark = pytest.mark.full

SPEC = SMALL.model_copy(update={"vision": None})


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a fused checkpoint, with those of each expert apart."""
    found = dict[str, Tensor]()
    for key, tensor in tensors.items():
        stem, _, last = key.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last)
        if not parts:
            found[key] = tensor
            continue
        for expert, each in enumerate(tensor):  # [in, out]
            for part, matrix in zip(parts, each.t().chunk(len(parts)), strict=True):
                found[f"{stem}.{expert}.{part}.weight"] = matrix.contiguous()
    return found


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "fused"
    write_random_checkpoint(SPEC, folder, seed=8)
    return folder


@pytest.fixture(scope="module")
def separate(fused: Path) -> Path:
    folder = fused.with_name("separate")
    shutil.copytree(fused, folder)
    file = folder / "model.safetensors"
    save_file(_separate(load_file(file)), file, metadata={"format": "pt"})
    return folder


def test_logits_are_those_of_transformers(fused: Path, separate: Path, tmp_path: Path) -> None:
    rows = [torch.randint(0, SPEC.text.vocab, (n,)) for n in (21, 8)]
    expected = transformers_logits(fused, rows)
    assert read_model(separate)[0].separate_experts and not read_model(fused)[0].separate_experts
    sessions = [moec.open_session(separate)]
    for target, weights in (("onnx", None), ("ort", None), ("ort", "pack")):
        out = tmp_path / f"{target}-{weights}"
        art = moec.export(separate, target, "fp32", out, weights=weights)
        assert (art.manifest.weights.mode == "in-place") == (weights is None)
        sessions.append(moec.open_session(out))
    for session in sessions:
        assert_rows_agree(session, rows, expected)


@pytest.mark.parametrize(
    "target, precision, scheme",
    [
        ("ort", "int4", None),
        ("ort", "fp32", None),
        pytest.param("torch", "fp8", "dynamic", marks=pytest.mark.slow),
        ("onnx", "fp8", "meta"),
        ("onnx", "fp8", "static"),
        ("onnx", "fp8", "modelopt"),
        ("onnx", "fp8", "deepseek"),
        ("tensorrt", "fp8", "mixed"),
    ],
)
def test_packed_weights_are_those_of_the_fused_checkpoint(
    target: str, precision: str, scheme: str | None, fused: Path, separate: Path, tmp_path: Path
) -> None:
    """Byte for byte, and an artefact of one checkpoint may be bound to the other."""
    static = bool(scheme and SCHEMES[scheme].static)
    tokens = torch.randint(0, SPEC.text.vocab, (4, 24))
    options = EngineOptions(build=False) if target == "tensorrt" else None
    arts = [
        moec.export(
            folder, target, precision, tmp_path / folder.name, weights="pack", scheme=scheme,
            scales=moec.calibrate(folder, tokens) if static else None, options=options,
        )
        for folder in (fused, separate)
    ]  # fmt: skip
    one, two = (load_file(art.path / next(iter(art.manifest.weights.shards))) for art in arts)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), two[name].view(-1).view(torch.uint8))
    assert arts[0].manifest.spec.separate_experts is arts[1].manifest.spec.separate_experts is False


@pytest.mark.parametrize(
    "target, precision, weights",
    [
        ("onnx", "fp32", None),
        pytest.param("ort", "int4", None, marks=pytest.mark.slow),
        pytest.param("ort", "fp16", None, marks=pytest.mark.slow),
        pytest.param("torch", "fp8", None, marks=pytest.mark.slow),
        pytest.param("tensorrt", "bf16", None, marks=pytest.mark.slow),
        pytest.param("onnx", "fp8", None, marks=pytest.mark.slow),
    ],
)
def test_every_target_is_proven(
    target: str, precision: str, weights: str | None, separate: Path, tmp_path: Path
) -> None:
    options = EngineOptions(build=False) if target == "tensorrt" else None
    art = moec.export(separate, target, precision, tmp_path / "art", options=options)
    assert_passed(moec.validate(art.path, tokens=19))


@pytest.mark.parametrize(
    "target, precision",
    [("onnx", "fp32"), ("ort", "fp32"), ("ort", "int4"), ("onnx", "fp8")],
)
def test_experts_that_are_bound_later_are_those_of_a_build(
    target: str, precision: str, separate: Path, tmp_path: Path
) -> None:
    built = moec.export(separate, target, precision, tmp_path / "built")
    moec.export(read_model(separate)[0], target, precision, tmp_path / "later")
    bound = moec.bind(tmp_path / "later", separate)
    assert bound.graph("model").read_bytes() == built.graph("model").read_bytes()
    assert_passed(moec.validate(bound.path, tokens=19))


def test_fp8_attention_beside_wide_experts(tmp_path: Path) -> None:
    """compressed-tensors with the experts in `ignore`; the linearised experts stay wide."""
    attention = tuple(f"layers.*.attn.{part}.weight" for part in "qkvo")
    rule = Rule(of=attention, weight="channel", inputs="token")
    scheme = SCHEMES["dynamic"].model_copy(
        update={"name": "compressed-tensors", "layout": "compressed-tensors", "rules": (rule,)}
    )
    spec = ModelSpec.model_validate(
        SPEC.model_dump() | {"scheme": scheme.model_dump(), "separate_experts": True}
    )
    folder = tmp_path / "mixed"
    write_random_checkpoint(spec, folder, seed=9)
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert any("experts" in each for each in ignored)
    found = read_model(folder)[0]
    assert found.separate_experts and found.scheme and found.scheme.rules == (rule,)
    art = moec.export(folder, "onnx", "fp8", tmp_path / "art")
    assert art.manifest.weights.mode == "in-place"
    assert_passed(moec.validate(art.path, tokens=19))


def test_a_missing_expert_is_named(separate: Path, tmp_path: Path) -> None:
    folder = tmp_path / "missing"
    shutil.copytree(separate, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("experts.1.up_proj.weight"))
    del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(moec.MoecError, match=r"experts\.1\.up_proj\.weight"):
        read_model(folder)
