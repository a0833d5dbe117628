"""A proof must fail when the artefact is wrong, and say where."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec.artefact.artefact import Artefact, open_artefact, write_manifest
from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import File
from moec.runtime.engines import torch_program as torch_engine
from moec.runtime.engines.weights import load
from moec.runtime.proof import chunked_prefill as pieces
from moec.runtime.proof.compare import ENOUGH, SAME_INPUTS, TOLERANCES, error, worst_error
from moec.runtime.proof.report import Report
from moec.runtime.proof.validate import record
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from moec.weights.view import view
from tests.proofs import assert_passed
from tests.refusals import refusal


def test_a_right_artefact_passes_and_reports_everything(tiny_onnx: Path, tmp_path: Path) -> None:
    report = moec.validate(tiny_onnx)
    names = [check.name for check in report.checks]
    assert_passed(report)
    assert report.first_divergence is None
    assert {"layers.0", "layers.7 router", "argmax", "logits, chunk borders"} <= set(names)
    assert {"prefill against decode", "ragged batch against row alone"} <= set(names)
    assert {"weights, layers.0", "layers.7, each op", "graph files"} <= set(names)
    assert {"vision.tokens", "vision.layers.0", "vision.layers.1, each op"} <= set(names)
    assert {"vision.post", "vision.shuffle", "vision.adapter", "image_features"} <= set(names)
    images = [f"images: {what}" for what in ("fused", "logits", "argmax", "in pieces")]
    options = [f"{what}, session options fast" for what in ("logits", "argmax")]
    assert names[-7:] == [*images, *options, "graph files"]
    data = report.to_dict()
    assert data["passed"] and data["seed"] == report.seed
    report.to_html(tmp_path / "r.html")
    assert "PASSED" in (tmp_path / "r.html").read_text()
    record(tiny_onnx, report)
    assert open_artefact(tiny_onnx).manifest.parity == data


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_a_weightless_build_is_proven_on_its_twin(name: str, tmp_path: Path) -> None:
    artefact = moec.export(name, out=tmp_path / "a")
    report = moec.validate(artefact.path)
    assert_passed(report)
    assert report.twin
    assert sum(check.name.startswith("layers.") for check in report.checks) == {
        "scout": 144, "maverick": 120,
    }[name]  # fmt: skip
    assert any(check.name == "logits, chunk borders" for check in report.checks)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four layers, the last of which sees everything."""
    spec = reduced(PRESETS["tiny-scout"], 4)
    experts = spec.text.experts.model_copy(update={"count": 3})
    text = spec.text.model_copy(update={"experts": experts})
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    write_random_checkpoint(spec.model_copy(update={"text": text}), folder)
    return folder


@pytest.mark.full
@pytest.mark.parametrize(
    "context", [2, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 9))]
)
def test_an_engine_for_few_tokens_is_proven_within_them(
    context: int, small: Path, tmp_path: Path
) -> None:
    options = EngineOptions(context=context, batch=1, piece=context, build=False)
    art = moec.export(small, "tensorrt", "fp32", tmp_path / "a", options=options)
    report = moec.validate(art.path)
    assert_passed(report)
    assert report.tokens[0] == context
    (greedy,) = (check for check in report.checks if check.name == "greedy tokens")
    assert f"{min(8, context)}" in greedy.detail


@pytest.mark.slow
def test_a_weightless_build_with_a_plugin_is_proven_on_its_twin(
    tmp_path: Path,
) -> None:
    options = EngineOptions(context=32, piece=32, build=False)
    art = moec.export(
        "tiny-scout", "tensorrt", "fp8", tmp_path / "a", scheme="mixed", options=options
    )
    assert art.manifest.dialect == "tensorrt-plugin"
    report = moec.validate(art.path, tokens=12)
    assert_passed(report)
    assert report.twin


def test_a_device_that_is_none_is_refused(small: Path, tmp_path: Path) -> None:
    options = EngineOptions(context=8, piece=8, build=False)
    art = moec.export(small, "tensorrt", "fp32", tmp_path / "a", options=options)
    refusal(lambda: moec.validate(art.path, device="banana"), "banana", 2)
    refusal(lambda: moec.validate(art.path, device="cuda"), "cuda", 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_the_twin_of_target_torch_fits_every_kernel(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="kernels need triton")
    from moec.kernels.launches.prefill import fits, prefill_moe
    from moec.kernels.sizes import Sizes, check_sizes
    from tests.kernels.test_sizes import launch_all

    built = list[ModelSpec]()

    def build(artefact: Artefact, small: ModelSpec, *rest: object) -> Artefact:
        built.append(small)
        raise KeyError("seen")

    monkeypatch.setattr("moec.runtime.proof.validate.build_reduced", build)
    artefact = moec.export(name, target="torch", precision="fp8", out=tmp_path / "a")
    with pytest.raises(KeyError, match="seen"):
        moec.validate(artefact.path)
    (small,) = built
    text = small.text
    check_sizes(small)
    launch_all(small)
    sizes = Sizes(text.dim, text.experts.hidden, text.experts.count)
    assert fits(sizes) and prefill_moe(sizes, 100)
    ModelSpec.model_validate(small.model_dump())


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    ["scout", *(pytest.param(each, marks=pytest.mark.slow) for each in ("tiny-scout", "maverick"))],
)
def test_half_precision_is_proven_on_a_shallow_twin(name: str, tmp_path: Path) -> None:
    artefact = moec.export(name, precision="fp16", out=tmp_path / "a")
    report = moec.validate(artefact.path, seed=3)
    assert_passed(report)
    assert report.twin and "4 layers" in report.notes[-1]
    assert report.tokens == [101, 63]


@pytest.mark.full
def test_pieces_that_lose_an_image_are_noticed(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is right here; what feeds it the features of each piece is not."""
    right = pieces.features_within
    monkeypatch.setattr(
        pieces, "features_within", lambda *arguments: right(*arguments).roll(1, dims=0)
    )
    report = moec.validate(tiny_onnx, tokens=40, seed=1)
    assert report.first_divergence == "images: in pieces"


@pytest.mark.full
@pytest.mark.parametrize("tokens", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 7))])
def test_few_tokens_are_enough(tiny_onnx: Path, tokens: int) -> None:
    assert_passed(moec.validate(tiny_onnx, tokens=tokens))


def test_a_flipped_token_is_left_out_of_a_half_precision_error_and_many_are_not() -> None:
    expected = torch.randn(100, 8)
    for flipped, passes in ((0, True), (2, True), (3, False)):
        found = expected.clone()
        found[:flipped] = 9.0
        assert error("x", found, expected, TOLERANCES["fp16"]).passed is passes
        assert error("x", found, expected, TOLERANCES["fp32"]).passed is (flipped == 0)
    found[:] = torch.nan
    assert not error("x", found, expected, TOLERANCES["fp16"]).passed


def _constant(model: ir.Model, node: str, index: int, array: np.ndarray) -> None:  # type: ignore[type-arg]
    """Give input `index` of `node` a constant of its own."""
    target = next(each for each in model.graph if each.name == node)
    tensor = ir.tensor(array, name=f"{node}/wrong")
    value = ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    target.replace_input_with(index, value)


@pytest.mark.full
def test_nan_weights_are_reported_where_they_are(tiny: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for file in tiny.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (weights / file.name).write_bytes(file.read_bytes())
    key = "language_model.model.layers.5.self_attn.o_proj.weight"
    for shard in weights.glob("model-*.safetensors"):
        tensors = load_file(shard)
        if key in tensors:
            tensors[key][3, 4] = torch.nan
            save_file(tensors, shard)
    artefact = moec.export(weights, out=tmp_path / "a")
    report = moec.validate(artefact.path, tokens=20)
    assert not report.passed
    assert (report.first_divergence or "").startswith("layers.5")
    failed = next(check for check in report.checks if check.name == "layers.5")
    assert "not finite" in failed.detail
    assert report.to_dict()["passed"] is False


# ---------------------------------------------------------------- FP8: a layer on the same inputs


def _layers(report: Report) -> dict[str, bool]:
    ends = ("same inputs", "most tokens")
    return {each.name: each.passed for each in report.checks if each.name.endswith(ends)}


@pytest.mark.usefixtures("without_graph_files")
@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 8])
def test_a_tie_that_flips_a_router_fails_no_layer(seed: int, fp8_twin: Path) -> None:
    """With seed 8 three of 32 tokens of layer 1 go to another expert."""
    checks = _layers(moec.validate(fp8_twin, tokens=20, seed=seed))
    assert len(checks) == 2 * 9 and all(checks.values()), checks


@pytest.fixture
def without_graph_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not write a graph of full size to compare with: other tests do, and it takes long."""
    monkeypatch.setattr("moec.runtime.proof.validate.graph_files", lambda artefact: ())


@pytest.fixture(scope="module")
def fp8_twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scout for target torch, without weights."""
    out = tmp_path_factory.mktemp("fp8") / "scout"
    spec = PRESETS["scout"].model_copy(update={"vision": None})
    return moec.export(spec, target="torch", precision="fp8", out=out).path


@pytest.mark.usefixtures("without_graph_files")
@pytest.mark.slow
def test_a_wrong_scale_of_a_program_fails_its_layer(
    fp8_twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _damage(monkeypatch, "layers.1.attn.o.weight_scale", lambda scale: scale * 1.2)
    checks = _layers(moec.validate(fp8_twin, tokens=40, seed=1))
    failed = [name for name, passed in checks.items() if not passed]
    assert failed == ["layers.1.attn.residual, same inputs"]


@pytest.mark.usefixtures("without_graph_files")
@pytest.mark.slow
def test_one_wrong_expert_fails_its_layer(fp8_twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the tokens is no half, and too few for the limit of most."""
    _damage(monkeypatch, "layers.1.moe.down", lambda down: torch.cat([down[1:2], down[1:]]))
    report = moec.validate(fp8_twin, tokens=160, seed=1)
    failed = [each for each in report.checks if not each.passed]
    assert (failed[0].name, failed[0].detail) == ("layers.1, same inputs", "expert 0")


def _damage(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    def changed(*given: object) -> dict[str, torch.Tensor]:
        found = load(*given)  # type: ignore[arg-type]
        return found | {name: change(found[name])}

    monkeypatch.setattr(torch_engine, "load", changed)


@pytest.mark.slow
def test_a_scale_three_per_cent_off_fails_its_layer(tiny: Path, tmp_path: Path) -> None:
    artefact = moec.export(tiny, precision="fp8", scheme="dynamic", out=tmp_path / "a")
    scale = view(artefact.stored()["layers.2.attn.o.weight_scale"])
    model = ir.load(artefact.graph("model"))
    _constant(model, "layers.2.attn.o.weight.wide", 1, 1.03 * scale.numpy())
    ir.save(model, artefact.graph("model"))
    file = artefact.graph("model")
    files = artefact.manifest.files | {file.name: File(size=file.stat().st_size, sha256="0" * 64)}
    write_manifest(artefact.path, artefact.manifest.model_copy(update={"files": files}))
    checks = _layers(moec.validate(artefact.path, tokens=20, seed=1))
    assert [name for name, passed in checks.items() if not passed] == ["layers.2, same inputs"]


def test_the_worst_expert_is_the_error_of_a_layer() -> None:
    expected = torch.randn(100, 8)
    found, chosen = expected.clone(), torch.arange(100)[:, None] % 12
    limits = SAME_INPUTS["bf16"]
    assert worst_error("x", found, expected, chosen, limits).passed
    found[chosen[:, 0] == 3] += 1.0
    assert int((chosen == 3).sum()) >= ENOUGH
    check = worst_error("x", found, expected, chosen, limits)
    assert not check.passed and check.detail == "expert 3"
    assert worst_error("x", found, expected, None, limits).passed
    assert worst_error("x", found[:60], expected[:60], chosen[:60], limits).passed  # 5 are few
    found[0] = torch.nan
    assert not worst_error("x", found, expected, chosen, limits).passed


@pytest.mark.slow
def test_a_narrow_twin_of_short_rows_has_more_of_them(tmp_path: Path) -> None:
    """Among few tokens one that FP8 moved to another expert would be a large part of an error."""
    art = moec.export("scout", target="torch", precision="fp8", out=tmp_path / "a")
    report = moec.validate(art.path, tokens=9)
    assert_passed(report)
    assert report.tokens == [9, 5] * 10
    details = {check.name: check.detail for check in report.checks}
    assert "rows of 10 x [9, 5] tokens" in details["prefill against decode"]
