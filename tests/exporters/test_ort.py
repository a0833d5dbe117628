"""Target ort: full-size builds, what is rewritten, binding later, sizes that cannot be held."""

import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

import moec
from benchmarks.sparse_checkpoint import write_sparse_checkpoint
from moec.spec.errors import MoecError
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.refusals import refused_and_nothing_left

FUSED = {"GroupQueryAttention", "SkipSimplifiedLayerNormalization"}


def _operators(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in ir.traversal.RecursiveGraphIterator(ir.load(path).graph):
        key = node.op_type if node.domain else f"onnx {node.op_type}"
        found[key] = found.get(key, 0) + 1
    return found


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "precision", "experts"),
    [
        pytest.param("scout", "fp32", None, marks=pytest.mark.slow),
        pytest.param("maverick", "fp32", None, marks=pytest.mark.slow),
        ("scout", "bf16", "MoE"),
        ("maverick", "int4", "QMoE"),
    ],
)
def test_full_size_models_pass_the_checker_by_path(
    name: str, precision: str, experts: str | None, tmp_path: Path
) -> None:
    art = moec.export(name, target="ort", precision=precision, out=tmp_path / "a")
    assert art.manifest.build.bytes_written < 60e6
    for part in art.parts:
        # Inference over the nested branches of experts in place takes longer than all the rest.
        onnx.checker.check_model(str(art.graph(part)), full_check=experts is not None)
    moes = sum(layer.moe for layer in PRESETS[name].text.all_layers)
    for part in ("model", "genai/model"):
        found = _operators(art.graph(part))
        assert found["GroupQueryAttention"] == 48
        assert found["SkipSimplifiedLayerNormalization"] == 95
        assert not {"onnx Attention", "onnx TensorScatter"} & found.keys()
        if experts:
            assert found[experts] == moes
        else:  # slices of the fused tensors, each behind an If or at the leaf of a tree of them
            assert found["onnx If"] == moes * (16 if name == "scout" else 127)
    bytes_ = {"bf16": 0, "fp32": 0, "int4": 97}[precision]
    assert len([p for p in art.manifest.rewritten.values() if p.bits == 8]) >= bytes_


@pytest.mark.slow
def test_full_size_weights_stay_in_place(tmp_path: Path) -> None:
    """A sparse checkpoint of the full size: only headers are read, and no byte is copied."""
    write_sparse_checkpoint(PRESETS["scout"], tmp_path / "weights")
    art = moec.export(tmp_path / "weights", target="ort", out=tmp_path / "a")
    build = art.manifest.build
    assert build.bytes_copied == build.bytes_packed == 0 and build.bytes_written < 60e6
    model = ir.load(art.model)
    slices = [v for v in model.graph.initializers.values() if "moe.gate_up[" in str(v.name)]
    assert len(slices) == 48 * 16 and all(v.const_value is not None for v in slices)
    offsets = {v.name: v.const_value.offset for v in slices}  # type: ignore[union-attr]
    size = 5120 * 2 * 8192 * 2
    assert offsets["layers.0.moe.gate_up[3]"] - offsets["layers.0.moe.gate_up[0]"] == 3 * size
    config = json.loads((art.path / "genai" / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    folder = decoder["session_options"]["session.model_external_initializers_file_folder_path"]
    assert (art.path / "genai" / folder).resolve() == (tmp_path / "weights").resolve()
    assert config["model"]["type"] == "decoder" and decoder["num_hidden_layers"] == 48


@pytest.mark.full
@pytest.mark.parametrize(
    "precision",
    ["fp32", "int4", *(pytest.param(p, marks=pytest.mark.slow) for p in ("int8", "bf16"))],
)
def test_binding_later_gives_the_same_artefact(precision: str, tiny: Path, tmp_path: Path) -> None:
    at_once = moec.export(tiny, target="ort", precision=precision, out=tmp_path / "once")
    later = moec.export(
        moec.load_spec(tiny), target="ort", precision=precision, out=tmp_path / "later"
    )
    assert later.manifest.weights.mode == "unbound"
    bound = moec.bind(tmp_path / "later", tiny)
    assert bound.manifest.weights.tensors == at_once.manifest.weights.tensors
    assert bound.manifest.packings == at_once.manifest.packings
    ours, theirs = (
        {name: file.sha256 for name, file in art.manifest.files.items()} for art in (bound, at_once)
    )
    assert ours == theirs


@pytest.mark.full
def test_placements_that_do_not_fit_the_graph_are_refused(tiny: Path, tmp_path: Path) -> None:
    spec = moec.load_spec(tiny)
    packed = moec.export(spec, target="ort", precision="int8", out=tmp_path / "packed").path
    plain = moec.export(spec, target="ort", out=tmp_path / "plain").path
    for art, mode in ((packed, "in-place"), (plain, "pack")):
        with pytest.raises(MoecError, match=f"--weights {mode}"):
            moec.bind(art, tiny, weights=mode)


def test_sizes_that_the_operators_cannot_hold_are_refused(tmp_path: Path) -> None:
    spec = reduced(PRESETS["scout"], 4)
    odd = spec.model_copy(update={"text": spec.text.model_copy(update={"head_dim": 12})})
    refused_and_nothing_left(
        tmp_path, lambda: moec.export(odd, target="ort", out=tmp_path / "out"), "text.head_dim"
    )
    refused_and_nothing_left(
        tmp_path,
        lambda: moec.export(spec, target="ort", precision="int4", out=tmp_path / "out"),
        "text.dim" if spec.text.dim % 64 else "text.experts.hidden",
    )


def test_a_nan_in_the_checkpoint_stops_a_packed_build(tiny: Path, tmp_path: Path) -> None:
    spec = reduced(PRESETS["scout"], 4).model_copy(update={"vision": None})
    write_random_checkpoint(spec, tmp_path / "weights")
    path = tmp_path / "weights" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.layers.1.feed_forward.experts.down_proj"][2, 3, 4] = torch.nan
    save_file(tensors, path)
    with pytest.raises(MoecError, match=r"layers\.1\.feed_forward\.experts\.down_proj"):
        moec.export(tmp_path / "weights", target="ort", weights="pack", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
