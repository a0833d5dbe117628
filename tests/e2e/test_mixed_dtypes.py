"""Checkpoints whose tensors have several types, against transformers, which widens all of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec.artefact.engine_options import EngineOptions
from moec.spec import names
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint
from moec.weights.shard import read_shard
from tests.families import CASES
from tests.oracle import assert_rows_agree, transformers_logits
from tests.proofs import assert_passed
from tests.small import SMALL

pytestmark = pytest.mark.full

SPEC = SMALL.model_copy(update={"vision": None})
#: what is stored as float32 among bf16, by key
MIXES: dict[str, Callable[[str], bool]] = {
    "norms and routers": lambda key: key.endswith(("norm.weight", "router.weight")),
    "a norm, an expert stack and a head": lambda key: key.endswith(
        ("layers.0.input_layernorm.weight", "down_proj", "lm_head.weight")
    ),
}


def _write(folder: Path, odd: Callable[[str], bool]) -> Path:
    write_random_checkpoint(SPEC, folder, seed=6)
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(file)
    for key in filter(odd, tensors):  # with bits that bf16 does not have
        noise = torch.randn(tensors[key].shape, generator=generator)
        tensors[key] = tensors[key].float() * (1 + 0.01 * noise)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=MIXES)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("mixed") / "mixed", MIXES[request.param])


def test_logits_are_those_of_transformers(mixed: Path, tmp_path: Path) -> None:
    rows = [torch.randint(0, SPEC.text.vocab, (n,)) for n in (21, 8)]
    expected = transformers_logits(mixed, rows)
    sessions = [moec.open_session(mixed)]
    for target, weights in (("onnx", None), ("ort", None), ("ort", "pack")):
        out = tmp_path / f"{target}-{weights}"
        art = moec.export(mixed, target, "fp32", out, weights=weights)
        assert (art.manifest.weights.mode == "in-place") == (weights is None)
        assert bool(art.manifest.rewritten) == (weights is not None)
        sessions.append(moec.open_session(out))
    for session in sessions:
        assert_rows_agree(session, rows, expected)


@pytest.mark.parametrize(
    "target, precision, scheme",
    [
        ("onnx", "fp8", "modelopt"),
        pytest.param("torch", "fp8", "dynamic", marks=pytest.mark.slow),
        pytest.param("onnx", "fp32", None, marks=pytest.mark.slow),
        pytest.param("ort", "fp8", "meta", marks=pytest.mark.slow),
        pytest.param("ort", "fp16", None, marks=pytest.mark.slow),
        ("ort", "int4", None),
        pytest.param("tensorrt", "fp8", "mixed", marks=pytest.mark.slow),
        pytest.param("tensorrt", "bf16", None, marks=pytest.mark.slow),
    ],
)
def test_every_target_is_proven(
    target: str, precision: str, scheme: str | None, tmp_path: Path
) -> None:
    folder = _write(tmp_path / "mixed", MIXES["norms and routers"])
    static = scheme in ("modelopt", "mixed")
    scales = moec.calibrate(folder, torch.randint(0, 256, (4, 24))) if static else None
    options = EngineOptions(build=False) if target == "tensorrt" else None
    art = moec.export(
        folder, target, precision, tmp_path / "art", scheme=scheme, scales=scales, options=options
    )
    assert_passed(moec.validate(art.path, tokens=19))


def test_headers_give_the_types(tmp_path: Path) -> None:
    """Families of tensors of which all have one type go by one name."""
    folder = _write(tmp_path / "mixed", MIXES["a norm, an expert stack and a head"])
    spec, _, entries = read_model(folder)
    assert spec.dtype == "bf16"
    assert spec.dtypes == {
        "layers.0.attn.norm.weight": "fp32", "layers.*.moe.down": "fp32", "head.weight": "fp32",
    }  # fmt: skip
    shard = read_shard(folder / "model.safetensors").tensors
    assert {spec.stored(name) == entry.dtype for name, entry in entries.items()} == {True}
    assert {each.dtype for each in shard.values()} == {"bf16", "fp32"}
    assert spec.stored(names.attention(1, "norm", "weight")) == "bf16"


def test_other_types_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "mixed", lambda key: False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(moec.MoecError, match="fp64"):
        read_model(folder)


def test_a_build_without_weights_takes_no_other_types(tmp_path: Path) -> None:
    folder = _write(tmp_path / "mixed", MIXES["norms and routers"])
    plain = moec.export(SPEC, "onnx", "fp32", tmp_path / "plain")
    with pytest.raises(moec.MoecError, match="dtypes"):
        moec.bind(plain.path, folder)
    spec, *_ = read_model(folder)
    art = moec.export(spec, "onnx", "fp32", tmp_path / "mixed-art")
    assert moec.bind(art.path, folder).manifest.weights.mode == "in-place"


@pytest.mark.parametrize(
    "target, precision",
    [
        ("torch", "bf16"),
        ("onnx", "fp8"),
        pytest.param("torch", "fp8", marks=pytest.mark.slow),
    ],
)
def test_one_expert_may_have_another_type(target: str, precision: str, tmp_path: Path) -> None:
    """A build without weights names the types of whole stacks, as one with weights does."""
    folder = tmp_path / "mixed"
    write_random_checkpoint(CASES["qwen3"], folder, seed=3)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.mlp.experts.0.down_proj.weight"
    tensors[key] = tensors[key].float() * 1.001
    save_file(tensors, file, metadata={"format": "pt"})
    direct = moec.export(folder, target, precision, tmp_path / "direct")
    later = moec.export(read_model(folder)[0], target, precision, tmp_path / "later")
    assert later.manifest.spec.dtypes == direct.manifest.spec.dtypes
    assert later.manifest.spec.dtypes["layers.0.moe.down"] == "fp32"
    moec.bind(later.path, folder)
    one, other = (
        {file.name: file.read_bytes() for file in art.path.glob("*.safetensors")}
        for art in (direct, later)
    )
    assert one and one == other
