"""Targets of TensorRT: what is in their ONNX, and what it computes in ONNX's interpreter."""

import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import moec
from moec.artefact.artefact import Artefact, open_artefact
from moec.artefact.engine_options import EngineOptions
from moec.exporters.builder import builder_of
from moec.exporters.engines import trtexec_commands
from moec.exporters.export import export
from moec.exporters.onnx.lowering import DTYPES
from moec.graph_builder.ops import FP8
from moec.runtime.open import artefact_session, eager_session
from moec.runtime.proof.compare import SAME_INPUTS, error
from moec.runtime.proof.under_test import ArtefactUnderTest
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.refusals import refusal
from tests.strategies import specs

#: the ONNX alone
SMALL = EngineOptions(context=512, build=False)
FP8_TYPE = DTYPES[FP8]
#: what TensorRT lacks, or whose shapes only a run knows
MISSING = {"NonZero", "Unique", "Loop", "ScatterElements", "ScatterND"}
#: what may take FP8
TAKES_FP8 = {"DequantizeLinear", "MoecMoe"}


@pytest.fixture(scope="module", params=["fp32", "bf16", "static", "mixed"])
def art(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """tiny-scout without engines: wide, and in FP8 by a scheme."""
    how = {"scheme": request.param} if request.param in ("static", "mixed") else {}
    precision = "fp8" if how else request.param
    out = tmp_path_factory.mktemp("tensorrt") / request.param
    return export(tiny, "tensorrt", precision, out, options=SMALL, **how).path


@pytest.fixture(scope="module")
def wide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tensorrt") / "wide"
    return export(tiny, "tensorrt-rtx", "bf16", out, options=SMALL).path


def test_the_onnx_holds_what_the_parser_takes_as_meant(art: Path) -> None:
    manifest, model = open_artefact(art).manifest, ir.load(art / "model.onnx")
    nodes, text = list(model.graph.all_nodes()), manifest.spec.text
    kinds = Counter(node.op_type for node in nodes)
    assert not MISSING & set(kinds)
    attentions = [node for node in nodes if node.op_type == "Attention"]
    assert len(attentions) == text.layers
    for node in attentions:
        assert len(node.inputs) == 4 and node.attributes["scale"].as_float() == 1.0
        assert node.domain == "trt" and node.attributes["TRT_decomposable"].as_int() == 1
    for node in nodes:
        for each in node.inputs:
            if each is not None and each.dtype == FP8_TYPE:
                assert node.op_type in TAKES_FP8, node.name
    assert kinds["If"] == (text.layers if manifest.precision != "fp8" else 0)
    assert kinds["MoecMoe"] == (text.layers if manifest.dialect == "tensorrt-plugin" else 0)
    assert all(each.uses() for each in model.graph.inputs)
    fed = {port.name for port in manifest.inputs}
    assert {"input_ids", "past.0.key", "ring.last", "image_features"} <= fed
    taken = {str(each.name) for each in model.graph.inputs} - fed
    assert taken and all(".moe." in name for name in taken), "experts are given, the rest is inside"


def test_caches_have_fixed_sizes(wide: Path) -> None:
    ports = {port.name: port.shape for port in open_artefact(wide).manifest.inputs}
    assert ports["past.0.key"] == ("batch", 2, 128, 32), "a ring has the slots of its chunk"
    assert ports["past.3.key"] == ("batch", 2, 512, 32), "a global layer those of the context"


@pytest.mark.full
def test_it_computes_the_golden_logits(
    wide: Path, tiny: Path, tmp_path: Path, golden: dict[str, Tensor]
) -> None:
    single = export(tiny, "tensorrt", "fp32", tmp_path / "fp32", options=SMALL).path
    for path in (wide, single):  # half precision is widened
        session = moec.open_session(path, engine="interpreter")
        logits = session.logits(golden["input_ids"])
        assert (logits[:, -48:] - golden["logits"]).abs().max() < 2e-4
        assert torch.equal(logits.argmax(-1), golden["argmax"])
        seen = session.logits(golden["mm_input_ids"], golden["pixel_values"])
        assert (seen - golden["mm_logits"]).abs().max() < 2e-4
        plain = session.logits(golden["mm_input_ids"])
        assert (plain - golden["mm_logits"]).abs().max() > 1, "without features all are tokens"


@pytest.mark.full
def test_decode_past_a_chunk_border_and_rows_of_different_lengths(
    wide: Path, golden: dict[str, Tensor]
) -> None:
    session, ids = moec.open_session(wide, engine="interpreter"), golden["input_ids"][:, :134]
    expected = session.logits(ids)
    lengths = torch.tensor([127, 3])
    logits, cache = session.prefill(ids[:, :127], lengths=lengths)
    for step in range(4):  # row 0 goes over the border at 128
        ends = lengths + step
        for row, end in enumerate(ends.tolist()):
            assert (logits[row] - expected[row, end - 1]).abs().max() < 2e-4
        logits = session.decode(ids[[0, 1], ends], cache)


def test_more_than_the_context_is_refused(wide: Path) -> None:
    session = moec.open_session(wide, engine="interpreter")
    with pytest.raises(MoecError) as caught:
        session.generate([[1] * 500], max_new_tokens=20)
    assert "--context 519" in str(caught.value), "the last token is not fed"


def test_a_long_context_makes_no_large_file(sound: Path, tmp_path: Path) -> None:
    options = EngineOptions(context=1 << 24, build=False)
    art = export(sound, "tensorrt", "bf16", tmp_path / "a", options=options)
    assert art.model.stat().st_size < 1e6


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_a_damaged_file_is_refused(target: str, sound: Path, tmp_path: Path) -> None:
    options = SMALL if target == "tensorrt" else None
    art = export(sound, target, "fp32", tmp_path / "a", options=options)
    load = builder_of(target).load
    assert len(load(art, "model").graph)
    art.model.write_bytes(b"\xff" * art.model.stat().st_size)
    refusal(lambda: load(art, "model"), "model.onnx", 1)
    if target == "tensorrt":
        refusal(lambda: moec.open_session(art.path, engine="interpreter"), "model.onnx", 1)
        refusal(lambda: moec.validate(art.path), "build the artefact again", 1)


@pytest.mark.full
@pytest.mark.parametrize(
    ("scheme", "cache", "dialect"),
    [
        ("static", None, "tensorrt"),
        pytest.param("mixed", None, "tensorrt-plugin", marks=pytest.mark.slow),
        pytest.param("modelopt", "wide", "tensorrt", marks=pytest.mark.slow),
    ],
)
def test_each_layer_in_fp8_is_the_eager_layer(
    scheme: str, cache: str | None, dialect: str, tiny: Path, tmp_path: Path
) -> None:
    art = export(tiny, "tensorrt", "fp8", tmp_path / "a", scheme=scheme, cache=cache, options=SMALL)
    assert art.manifest.dialect == dialect
    hidden = ["embed", *(f"layers.{i}.out" for i in range(art.manifest.spec.text.layers))]
    ids = torch.randint(0, 4096, (1, 140))
    lengths = torch.tensor([140])
    found = artefact_session(art, taps=hidden, engine="interpreter").trace(ids, lengths, hidden)
    given = {name: found[name] for name in hidden}
    expected = ArtefactUnderTest(art, "cpu", "lean").reference_from(ids, lengths, given, hidden)
    for name in (*hidden[1:], "logits"):
        check = error(name, found[name], expected[name], SAME_INPUTS["fp32"])
        assert check.passed, check


@pytest.mark.full
@settings(
    max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@given(spec=specs())
def test_random_models_compute_what_eager_does(spec: ModelSpec) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(spec, Path(folder) / "weights")
        options = EngineOptions(context=24, piece=24, build=False)
        art = export(
            Path(folder) / "weights", "tensorrt", "fp32", Path(folder) / "a", options=options
        )
        ids = torch.randint(0, spec.text.vocab, (2, 20))
        session = artefact_session(art, engine="interpreter")
        reference = eager_session(spec, art.entries(), "fp32")
        found, expected = session.logits(ids), reference.logits(ids)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)
        _, cache = session.prefill(ids[:, :7])
        for at in range(7, 12):
            logits = session.decode(ids[:, at], cache)
            assert (logits - expected[:, at]).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("bindings", ["experts", "all", "none"])
def test_what_an_engine_is_given_can_be_chosen(bindings: str, sound: Path, tmp_path: Path) -> None:
    options = EngineOptions(context=64, piece=64, bindings=bindings, build=False)  # type: ignore[arg-type]
    art = export(sound, "tensorrt-rtx", "bf16", tmp_path / "a", options=options)
    graph = ir.load(art.path / "model.onnx").graph
    fed = {port.name for port in art.manifest.inputs}
    taken = {str(each.name) for each in graph.inputs} - fed
    inside = {
        str(name)
        for name, each in graph.initializers.items()
        if isinstance(each.const_value, ir.ExternalTensor)
    }
    assert ("layers.0.moe.down" in taken) == (bindings != "none")
    assert ("layers.0.attn.q.weight" in taken) == (bindings == "all")
    assert not taken & inside and bool(inside) == (bindings != "all")
    assert art.manifest.weights.mode == "in-place", "no byte of them is copied"


@pytest.mark.full
def test_scout_is_written_without_weights(tmp_path: Path) -> None:
    options = EngineOptions(build=False)
    art = export("scout", "tensorrt", "fp8", tmp_path / "a", options=options)
    assert art.manifest.dialect == "tensorrt-plugin" and art.manifest.compute == "bf16"
    assert art.manifest.build.bytes_written < 2e6
    model = ir.load(art.path / "model.onnx")
    shapes = {each.name: tuple(each.shape or ()) for each in model.graph.inputs}
    assert shapes["layers.47.moe.gate_up"] == (17, 16384, 5120)
    with pytest.raises(MoecError, match="without weights"):
        moec.open_session(art.path, engine="interpreter")


@pytest.mark.full
def test_binding_later_is_building_with_weights(tiny: Path, art: Path, tmp_path: Path) -> None:
    manifest = open_artefact(art).manifest
    scheme = manifest.spec.scheme
    export(
        moec.load_spec(tiny), "tensorrt", manifest.precision, tmp_path / "a", scheme=scheme,
        options=SMALL,
    )  # fmt: skip
    bound, built = moec.bind(tmp_path / "a", tiny), open_artefact(art)
    for part in ("model", "vision"):
        found, expected = (ir.load(each.graph(part)).graph for each in (bound, built))
        assert _ports(found.inputs) == _ports(expected.inputs)
        assert _ports(found.outputs) == _ports(expected.outputs)
        assert [_operands(node) for node in found] == [_operands(node) for node in expected]
        assert _bytes(found, bound) == _bytes(expected, built)


def _ports(values: Iterable[ir.Value]) -> dict[str, str]:
    """Names, types and shapes."""
    return {str(each.name): f"{each.dtype} {each.shape}" for each in values}


def _operands(node: ir.Node) -> tuple[str, list[str | None], list[str | None]]:
    inputs = [each and each.name for each in node.inputs]
    return node.op_type, inputs, [each.name for each in node.outputs]


def _bytes(graph: ir.Graph, art: Artefact) -> dict[str, bytes]:
    """What each initializer of a graph of `art` holds, wherever that lies."""
    found = {}
    for name, each in graph.initializers.items():
        held = each.const_value
        assert held is not None
        if isinstance(held, ir.ExternalTensor):
            start, size = held.offset or 0, held.length or 0
            whole = (art.weights_folder / held.location).read_bytes()
            found[name] = whole[start : start + size]
        else:
            found[name] = held.tobytes()
    return found


@pytest.mark.parametrize(
    "choice, named",
    [
        ({"scheme": "dynamic"}, "--scheme static"),
        ({"scheme": "deepseek"}, "--scheme static"),
        ({"scheme": "modelopt"}, "--cache wide"),
        ({"scheme": "static", "cache": "fp8"}, "--cache wide"),
    ],
    ids=str,
)
def test_schemes_that_no_engine_has_are_refused(
    choice: dict[str, str], named: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(MoecError) as caught:
        export(tiny, "tensorrt", "fp8", tmp_path / "a", options=SMALL, **choice)  # type: ignore[arg-type]
    assert named in str(caught.value) and not list(tmp_path.iterdir())


def test_heads_that_no_kernel_has_are_refused_in_half_precision(tmp_path: Path) -> None:
    spec = _text(head_dim=12)
    for precision in ("bf16", "fp16", "fp8"):
        error = refusal(
            lambda: export(spec, "tensorrt-rtx", precision, tmp_path / "a", options=SMALL),  # noqa: B023
            "text.head_dim",
        )
        assert error.found == "12" and error.next_step == "use --precision fp32"
    export(spec, "tensorrt-rtx", "fp32", tmp_path / "a", options=SMALL)


@pytest.mark.parametrize("name", ["dim", "hidden"])
def test_sizes_that_the_plugin_has_no_kernels_for_are_refused(name: str, tmp_path: Path) -> None:
    spec = _text(**{name: 80})
    build = partial(export, spec, "tensorrt", "fp8", options=SMALL)
    error = refusal(lambda: build(tmp_path / "a", scheme="mixed"), name)
    assert error.expected.startswith("a multiple of 32") and "--scheme static" in error.next_step
    build(tmp_path / "a", scheme="static")


@pytest.mark.full
def test_a_build_of_other_targets_imports_no_triton() -> None:
    code = "import sys, moec.exporters.export; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def _text(hidden: int = 64, **changes: int) -> ModelSpec:
    """The decoder of tests' model, of other sizes."""
    spec = reduced(PRESETS["tiny-scout"])
    experts = spec.text.experts.model_copy(update={"hidden": hidden, "shared_hidden": hidden})
    text = spec.text.model_copy(update={"experts": experts, **changes})
    return ModelSpec.model_validate(spec.model_copy(update={"text": text}).model_dump())


def test_options_without_engines_are_refused(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(MoecError, match="no engines"):
        export(sound, "onnx", out=tmp_path / "a", options=SMALL)
    with pytest.raises(ValueError, match="above context"):
        EngineOptions(context=8, piece=16)


@pytest.mark.full
def test_commands_for_trtexec(tiny: Path, tmp_path: Path, wide: Path) -> None:
    options = EngineOptions(context=256, batch=3, piece=64, build=False)
    art = export(tiny, "tensorrt", "fp8", tmp_path / "a", options=options)
    plugin, model, vision = trtexec_commands(art.path)
    assert (
        plugin.endswith("plugin/build.sh") and (art.path / "trtexec/plugin/programs.bin").is_file()
    )
    words = shlex.split(model)
    assert words[:2] == ["trtexec", f"--onnx={art.path}/model.onnx"]
    assert f"--staticPlugins={art.path}/trtexec/plugin/libmoec_plugin.so" in words
    decode, prefill = (words.index(f"--profile={i}") for i in range(2))
    assert "input_ids:3x1,past_lengths:3" in words[decode + 3], "largest: three rows, a token each"
    assert "input_ids:1x64,past_lengths:1" in words[prefill + 3]
    assert "past.3.key:3x2x256x32" in words[decode + 3]
    assert "pixel_values:8x3x56x56" in vision and "Plugins" not in vision


def test_trtexec_finds_weights_beside_the_model_alone(
    tiny: Path, tmp_path: Path, wide: Path
) -> None:
    art = export(tiny, "tensorrt", "bf16", tmp_path / "a", options=SMALL)
    with pytest.raises(MoecError, match="--weights link"):
        trtexec_commands(art.path)
    linked = moec.bind(art.path, tiny, weights="copy")
    assert len(trtexec_commands(linked.path)) == 2
    with pytest.raises(MoecError, match="target tensorrt-rtx"):
        trtexec_commands(wide)
