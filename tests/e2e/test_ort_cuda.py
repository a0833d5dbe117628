"""Target ort-cuda on a CPU: its graph in ONNX's interpreter, and what is refused without a GPU."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

import moec
from moec.artefact.artefact import open_artefact
from moec.cli import app
from moec.exporters.onnx.ort_cuda import FUSED_OPS, split, whole
from moec.graph_builder import ops
from moec.kernels.sizes import SMALLEST_HEAD, constants_text
from moec.runtime.engines.weights import load
from moec.spec.errors import MoecError
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from tests.proofs import assert_passed


@pytest.fixture(scope="module")
def built(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ort-cuda") / "art"
    return moec.export(tiny, "ort", "fp8", out=out, device="cuda").path


def test_a_layer_is_four_nodes_of_our_domain(built: Path) -> None:
    manifest = open_artefact(built).manifest
    assert (manifest.target, manifest.dialect) == ("ort-cuda", "ort-cuda-fp8")
    assert (manifest.precision, manifest.compute) == ("fp8", "bf16")
    graph = onnx.load(str(built / "model.onnx"), load_external_data=False).graph
    ours = [node.op_type for node in graph.node if node.domain == "moec"]
    layers = manifest.spec.text.layers
    assert ours == [
        "norm_fp8",
        *(["fp8_linear", "attention_fp8", "fp8_linear", "norm_moe_norm_fp8"] * (layers - 1)),
        *("fp8_linear", "attention_fp8", "fp8_linear", "norm_moe"),
        "rms_norm",
    ]
    assert not [node for node in graph.node if "Shape" in node.op_type and "rows" not in node.name]
    caches = [f"present.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    assert [each.name for each in graph.output] == ["logits", *caches]


def test_golden_logits_and_perplexity(built: Path, golden: dict[str, Tensor]) -> None:
    """As target torch says, whose graph this is."""
    session = moec.open_session(built, engine="interpreter")
    windows = golden["eval_ids"][:2]
    loss = functional.cross_entropy(session.logits(windows[:, :-1]).transpose(1, 2), windows[:, 1:])
    art = moec.export(session.artefact.checkpoint, "torch", "fp8", out=built.parent / "torch")
    torch_session = moec.open_session(art.path)
    logits = torch_session.logits(windows[:, :-1])
    expected = functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:])
    assert abs(loss / expected - 1) < 5e-3
    prompt = golden["input_ids"][:1, :40]
    found = session.generate(prompt, max_new_tokens=8)
    assert found.tolist() == torch_session.generate(prompt, max_new_tokens=8).tolist()


def test_the_proof_passes_and_says_what_ran(built: Path) -> None:
    report = moec.validate(built, tokens=300)
    assert_passed(report)
    assert any("The library was not run" in note for note in report.notes)


def test_a_graph_of_another_constant_fails(built: Path, tmp_path: Path) -> None:
    copy = moec.export(open_artefact(built).checkpoint, "ort-cuda", out=tmp_path / "art").path
    model = onnx.load(str(copy / "model.onnx"), load_external_data=False)
    node = next(each for each in model.graph.node if each.op_type == "norm_moe_norm_fp8")
    node.attribute[0].s = b"eps=0.5"
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(MoecError, match=r"model\.onnx"):
        moec.open_session(copy, engine="interpreter")


@pytest.mark.parametrize(("device", "message"), [("cpu", "device cuda"), ("cuda", "GPU")])
def test_where_it_cannot_run(built: Path, device: str, message: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(MoecError, match=message) as refused:
        moec.open_session(built, device=device)
    assert refused.value.exit_code == 3


def test_bench_on_a_device_that_it_does_not_run_on(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moec.runtime.bench.bench.PEERS", ())  # which take half a minute to compile
    found = CliRunner().invoke(app, ["bench", str(built), "--rounds", "1"])
    assert found.exit_code == 1
    assert f"onnxruntime-cuda fp8: {built} on cpu\n  found:    " in found.output
    assert "\n  next:     add --device cuda" in found.output


def test_a_model_of_other_ops_is_sent_to_target_torch(tmp_path: Path) -> None:
    with pytest.raises(MoecError, match=r"text\.qk_norm[\s\S]*use --target torch"):
        moec.export("olmoe-1b-7b", "ort", "fp8", out=tmp_path / "art", device="cuda")


def test_the_device_of_a_build(tiny: Path, tmp_path: Path) -> None:
    art = moec.export(tiny, "ort", "fp8", out=tmp_path / "cpu", device="cpu")
    other = moec.export(tiny, "ort", "fp8", out=tmp_path / "none")
    assert art.manifest.target == other.manifest.target == "ort"
    assert (art.path / "model.onnx").read_bytes() == (other.path / "model.onnx").read_bytes()
    assert (
        moec.export("scout", "ort", "bf16", out=tmp_path / "wide", device="cuda").manifest.target
        == "ort"
    )
    default = moec.export("scout", "ort", out=tmp_path / "default", device="cuda").manifest
    assert (default.target, default.precision) == ("ort-cuda", "fp8")
    for target, precision, device, message in (
        ("ort", "fp8", "tpu", "no such device"),
        ("torch", "fp8", "cuda", "for every device alike"),
        ("ort", "fp32", "cuda", "fp8 or bf16"),
        ("ort", "bf16", "cpu", "fp32 or fp16"),
    ):
        with pytest.raises(MoecError, match=message):
            moec.export(tiny, target, precision, out=tmp_path / "no", device=device)
    assert not (tmp_path / "no").exists()


def test_arguments_of_an_op_come_back_from_a_node() -> None:
    x, weight = torch.ones(2, 4), torch.ones(4)
    for op, given in (
        (ops.norm_fp8, (x, weight, 1e-5)),
        (ops.skip_norm, (x, x, weight, 1e-06)),
        (ops.fp8_linear, (x, weight, x, weight, "fp32")),
    ):
        tensors, numbers = split(op, given)
        back = whole(op, tensors, constants_text(numbers))
        assert [a is b or a == b for a, b in zip(back, given, strict=True)] == [True] * len(given)
    assert {each.name for each in FUSED_OPS} <= ops.OPS.keys()


def test_weights_are_pieces_of_the_files_of_target_torch(built: Path) -> None:
    """An expert layer is one tensor of the file, so that ONNX Runtime can read it by itself."""
    artefact = open_artefact(built)
    joined = load(artefact)
    for part in ("model", "vision"):
        model = onnx.load(str(built / f"{part}.onnx"))
        fed = {each.name for each in model.graph.input}
        weights = {each.name: each for each in model.graph.initializer if each.name in joined}
        assert not fed & joined.keys()
        assert len(weights) == (len(joined) if part == "model" else 0)
        for name, each in weights.items():
            assert list(each.dims) == list(joined[name].shape)
            assert each.raw_data == joined[name].view(torch.uint8).numpy().tobytes(), name


def test_bind_gives_the_bytes_of_a_build(built: Path, tiny: Path, tmp_path: Path) -> None:
    unbound = moec.export(moec.load_spec(tiny), "ort-cuda", out=tmp_path / "art").path
    moec.bind(unbound, tiny)
    for again in (False, True):
        if again:
            moec.bind(unbound, tiny)
        for part in ("model", "vision"):
            ours, theirs = (each / f"{part}.onnx" for each in (unbound, built))
            assert ours.read_bytes() == theirs.read_bytes()


def test_a_quantised_checkpoint_stays_in_place(tiny: Path, tmp_path: Path) -> None:
    """Its experts lie apart, so that they are inputs that the session joins."""
    moec.quantize(tiny, "dynamic", tmp_path / "fp8")
    art = moec.export(tmp_path / "fp8", "ort", out=tmp_path / "art", device="cuda")
    assert art.manifest.weights.mode == "in-place" and art.manifest.precision == "fp8"
    model = onnx.load(str(art.path / "model.onnx"), load_external_data=False)
    sources = {
        each.name: {entry.key: entry.value for entry in each.metadata_props}.get("moec.weight")
        for each in model.graph.input
    }
    text = art.manifest.spec.text
    assert len(str(sources["layers.0.moe.gate_up"]).split()) == 2 * (text.expert_count + 1)
    assert_passed(moec.validate(art.path, tokens=150))


def test_sizes_of_no_kernel_are_refused_by_the_build(tmp_path: Path) -> None:
    spec = reduced(PRESETS["scout"])
    assert spec.text.head_dim < SMALLEST_HEAD
    with pytest.raises(MoecError, match=r"text\.head_dim"):
        moec.export(spec, "ort", out=tmp_path / "no", device="cuda")
    assert not (tmp_path / "no").exists()
