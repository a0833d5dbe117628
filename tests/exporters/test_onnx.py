"""What the ONNX file itself must hold."""

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import moec
from moec.artefact.artefact import open_artefact
from moec.exporters.onnx.lowering import Rule, lower
from moec.exporters.onnx.ort_cuda import FUSED_OPS
from moec.exporters.onnx.standard import OPSET, STANDARD
from moec.exporters.onnx.write import DIALECTS, lower_model
from moec.graph_builder import ops
from moec.graph_builder.decoder import build_decoder
from moec.graph_builder.parts import build_parts
from moec.runtime.cache import new_cache
from moec.spec.errors import MoecError
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.proofs import assert_passed

FULL_SIZE = [(name, precision) for name in ("scout", "maverick") for precision in ("fp32", "bf16")]


def _all_nodes(model: ir.Model) -> list[ir.Node]:
    return list(ir.traversal.RecursiveGraphIterator(model.graph))


@pytest.mark.full
@pytest.mark.parametrize("name, precision", FULL_SIZE)
def test_full_size_models_pass_the_checker_by_path(
    name: str, precision: str, tmp_path: Path
) -> None:
    artefact = moec.export(name, precision=precision, out=tmp_path / "a")
    assert artefact.manifest.build.bytes_written < 20e6
    for part in ("model", "vision"):
        onnx.checker.check_model(str(artefact.graph(part)), full_check=True)
        model = ir.load(artefact.graph(part))
        assert model.opset_imports == {"": OPSET} and OPSET >= 24
        assert {node.domain for node in _all_nodes(model)} == {""}


def test_every_value_has_a_name_a_type_and_a_shape() -> None:
    expected = {
        "model": {"layers.3.attn.q", "layers.47.moe.routed", "fused", "logits"},
        "vision": {"vision.layers.33.mlp.fc1", "vision.shuffle", "image_features"},
    }
    for part, graph in build_parts(PRESETS["scout"], "fp16").items():
        model = lower_model(graph, "standard", part).model
        values = [value for node in _all_nodes(model) for value in node.outputs]
        assert all(v.name and v.type is not None and v.shape is not None for v in values)
        names = [value.name for value in values]
        assert len(names) == len(set(names))
        assert expected[part] <= set(names)


@pytest.mark.full
@pytest.mark.parametrize("part", ["model", "vision"])
@pytest.mark.parametrize("name", ["scout", pytest.param("maverick", marks=pytest.mark.slow)])
def test_declared_shapes_are_what_onnxruntime_produces(
    name: str, part: str, tmp_path: Path
) -> None:
    spec = reduced(PRESETS[name])
    spec = spec.model_copy(update={"text": spec.text.model_copy(update={"layers": 4})})
    write_random_checkpoint(spec, tmp_path / "weights")
    artefact = moec.export(tmp_path / "weights", out=tmp_path / "a", weights="copy")
    model = ir.load(artefact.graph(part))
    model.graph.outputs.extend(
        value
        for node in model.graph
        for value in node.outputs
        if value not in set(model.graph.outputs) and value.dtype != ir.DataType.BFLOAT16
    )
    ir.save(model, artefact.path / "tapped.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(artefact.path / "tapped.onnx", options)
    sizes = {"batch": 2, "sequence": 5, "logits": 3, "global_slots": 11, "ring_slots": 8}
    sizes |= {"tiles": 2, "image_tokens": 1}
    assert spec.tokens.image == 3  # one in the ids below
    text = {
        "input_ids": np.arange(10).reshape(2, 5),
        "image_features": np.ones((1, spec.text.dim), np.float32),
        "past_lengths": np.array([9, 3]),
        "lengths": np.array([5, 2]),
        "logit_index": np.array([[0, 1, 4], [0, 0, 1]]),
        **{k: v.numpy() for k, v in new_cache(spec, "fp32", 2, 11).tensors.items()},
    }
    feeds = {"model": text, "vision": {"pixel_values": np.ones((2, 3, 56, 56), np.float32)}}
    found = session.run(None, feeds[part])
    checked = 0
    for value, array in zip(model.graph.outputs, found, strict=True):
        dims = [d.value if isinstance(d, ir.SymbolicDim) else d for d in value.shape or ()]
        for dim, size in zip(dims, array.shape, strict=True):
            if isinstance(dim, str):
                if dim.endswith("active"):
                    continue
                if dim.startswith("fused."):
                    dim = "image_tokens"
                for symbol, number in sizes.items():
                    dim = dim.replace(symbol, str(number))
                dim = eval(dim)
            assert dim == size, value.name
            checked += 1
    assert checked > 300


def test_every_op_of_the_vocabulary_has_a_rule() -> None:
    fused = {ops.buffered_attention, ops.columns, ops.skip_norm, ops.spans_of_mask}
    of_engines = {ops.slot_mask}
    fused_by = ("layers", "attention", "routed", "slots", "collectives")
    modules = [f"moec.graph_builder.ops.fused.{each}" for each in fused_by]
    of_torch = {each for each in ops.OPS.values() if each.eager.__module__ in modules}
    plain = set(ops.OPS.values()) - fused - of_engines - of_torch
    expected = dict.fromkeys(DIALECTS, plain | fused) | {
        "standard": plain,
        "tensorrt": plain | of_engines | {ops.buffered_attention, ops.moe_layer},
        "ort-cuda-fp8": plain | {*FUSED_OPS, ops.attention_fp8, ops.skip_norm},
    }
    for name, dialect in DIALECTS.items():
        assert {rule.op for rule in dialect.rules} == expected[name], name


def test_an_op_without_a_rule_is_an_error_that_lists_the_rules() -> None:
    rules = [rule for rule in STANDARD if rule.op is not ops.rope]
    graph = build_decoder(reduced(PRESETS["scout"]))
    with pytest.raises(MoecError) as caught:
        lower(graph, rules, OPSET, "x")
    assert "rope" in str(caught.value) and "rms_norm" in str(caught.value)
    never = [*rules, Rule(ops.rope, rules[0].lower, when=lambda node: False)]
    with pytest.raises(MoecError, match="rope when"):
        lower(graph, never, OPSET, "x")


@pytest.mark.parametrize("mode", ["link", "copy"])
def test_weights_beside_the_model_open_in_plain_onnxruntime(
    mode: str, tiny: Path, tmp_path: Path
) -> None:
    _plain_run(moec.export(tiny, out=tmp_path / "a", weights=mode).path, None)


def test_weights_in_place_open_in_plain_onnxruntime_with_one_option(
    tiny: Path, tmp_path: Path
) -> None:
    artefact = moec.export(tiny, out=tmp_path / "a")
    assert artefact.manifest.build.bytes_copied == 0
    assert [path.suffix for path in artefact.path.iterdir() if path.suffix == ".safetensors"] == []
    _plain_run(artefact.path, artefact.weights_folder)


def test_a_copy_passes_the_checker_by_path_with_its_weights(tiny: Path, tmp_path: Path) -> None:
    artefact = moec.export(tiny, out=tmp_path / "a", weights="copy")
    onnx.checker.check_model(str(artefact.model), full_check=True)
    assert (artefact.path / "tokenizer.json").is_file()


def test_links_share_the_bytes(tiny: Path, tmp_path: Path) -> None:
    artefact = moec.export(tiny, out=tmp_path / "a", weights="link")
    for name in artefact.manifest.weights.shards:
        assert (artefact.path / name).samefile(tiny / name)


def test_a_hugging_face_cache_is_used_in_place(tiny: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(sorted(tiny.iterdir())):
        (blobs / f"hash{index}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/hash{index}")
    artefact = moec.export(snapshot, out=tmp_path / "a")
    assert moec.open_session(artefact.path).logits([[5, 6]]).shape == (1, 2, 4096)


def test_initializers_point_at_the_checkpoints_own_bytes(tiny: Path, tmp_path: Path) -> None:
    artefact = moec.export(tiny, out=tmp_path / "a")
    initializers = [
        tensor
        for part in ("model", "vision")
        for tensor in onnx.load(artefact.graph(part), load_external_data=False).graph.initializer
    ]
    external = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in initializers
        if tensor.external_data
    }
    assert external.keys() == artefact.manifest.weights.tensors.keys()  # each weight, once
    for name, ref in artefact.manifest.weights.tensors.items():
        place = external[name]
        assert (place["location"], int(place["offset"]), int(place["length"])) == (
            ref.file, ref.offset, ref.length,
        )  # fmt: skip
    types = {tensor.name: tensor.data_type for tensor in initializers}
    assert {types[name] for name in external} == {onnx.TensorProto.BFLOAT16}


@pytest.mark.full
def test_bind_gives_a_weightless_build_its_weights(tiny: Path, tmp_path: Path) -> None:
    built = moec.export(moec.load_spec("tiny-scout"), out=tmp_path / "a")
    assert built.manifest.weights.mode == "unbound"
    moec.bind(built.path, tiny, out=tmp_path / "b")
    moec.bind(built.path, tiny, weights="copy")  # in its own place
    direct = moec.export(tiny, out=tmp_path / "c")
    ids = torch.randint(0, 4096, (1, 140))
    expected = moec.open_session(direct.path).logits(ids)
    for name in ("a", "b"):
        assert torch.equal(moec.open_session(tmp_path / name).logits(ids), expected)


def test_bind_refuses_another_model(tiny: Path, tmp_path: Path) -> None:
    built = moec.export("scout", out=tmp_path / "a")
    with pytest.raises(MoecError, match=r"text\.layers"):
        moec.bind(built.path, tiny)
    assert open_artefact(built.path).manifest.weights.mode == "unbound"


@pytest.mark.full
def test_a_bound_artefact_can_be_bound_anew(tiny: Path, tmp_path: Path) -> None:
    artefact = moec.export(tiny, out=tmp_path / "a")
    (tmp_path / "moved").mkdir()
    for file in tiny.glob("*.safetensors"):
        (tmp_path / "moved" / file.name).write_bytes(file.read_bytes())
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / "moved" / name).write_bytes((tiny / name).read_bytes())
    again = moec.bind(artefact.path, tmp_path / "moved")
    assert again.manifest.weights.folder == str(tmp_path / "moved")
    assert_passed(moec.validate(again.path, tokens=20))


def _plain_run(folder: Path, weights: Path | None) -> None:
    """Run the artefact in a process that has onnxruntime and numpy, and cannot import moec."""
    script = f"""
import sys
sys.modules["moec"] = None
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
if {weights is not None}:
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", {str(weights)!r})
session = ort.InferenceSession({str(folder / "model.onnx")!r}, options)
feeds = {{"input_ids": np.array([[7, 8, 9]]), "past_lengths": np.array([0]),
         "lengths": np.array([3]), "logit_index": np.array([[2]])}}
feeds |= {{port.name: np.zeros((1, 16, 64), np.float32)
          for port in session.get_inputs() if port.name.startswith("past.")}}
logits, *caches = session.run(None, feeds)
print(logits.shape, len(caches), logits.argmax())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    expected = moec.open_session(folder).logits([[7, 8, 9]])[0, 2].argmax()
    assert done.stdout.split("\n")[0] == f"(1, 1, 4096) 16 {expected}"


def test_garbage_is_collected_again_after_a_build(tmp_path: Path) -> None:
    moec.export("tiny-scout", out=tmp_path / "a")
    assert gc.isenabled()
    with pytest.raises(MoecError):
        moec.export("tiny-scout", target="tpu")
    assert gc.isenabled()
