"""Building: what is reported, where weights come from, and what a failure leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto as T
from onnx import helper as h

from moec.artefact.engine_job import Built, Job
from moec.exporters.tensorrt import api
from moec.exporters.tensorrt.callbacks import new_log
from moec.exporters.tensorrt.engine import build_engine
from tests.exporters.tensorrt_engine.models import attention, job, model, spans, value
from tests.refusals import refusal, refused_and_nothing_left

trt = pytest.importorskip("tensorrt_rtx")


def test_a_build_says_how_it_went(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    made = attention()
    two = job(made, tmp_path, architectures=("SM89", "SM120"), profiles=(spans(made),) * 2)
    built = build_engine(two, lambda *event: seen.append(event))
    engine = Path(two.engine)
    assert {each.name for each in tmp_path.iterdir()} == {"model.onnx", "model.engine"}
    assert built.size == engine.stat().st_size > 100_000
    assert (built.package, built.architectures) == ("tensorrt_rtx", ("SM89", "SM120"))
    assert built.version.startswith("1.") and built.messages == ()
    assert list(built.seconds) == ["start", "parse", "check", "build"]
    assert all(0 <= each < 30 for each in built.seconds.values())
    assert 1e8 < built.peak_bytes < 2e9
    assert built.layers == sum(built.layer_types.values()) > 10
    assert built.layer_types["ATTENTION_OUTPUT"] == 1 and built.precisions["BF16"] > 10
    assert Built.model_validate_json(built.model_dump_json()) == built
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == list(built.seconds)
    steps = [done for stage, done, total in seen if stage == "build" and total == 1000]
    assert steps == sorted(set(steps)) and len(steps) > 20, "it is said how far the build is"


def test_warnings_that_say_something_are_passed_on(tmp_path: Path) -> None:
    told: list[str] = []
    log = new_log(trt, told.append)
    for severity, text in (
        (trt.ILogger.WARNING, "Attribute ptx not found\nin plugin node!"),
        (trt.ILogger.WARNING, "Make sure input n has Int64 binding."),
        (trt.ILogger.ERROR, "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime"),
        (trt.ILogger.ERROR, "no kernel"),
        (trt.ILogger.ERROR, "no kernel"),
        (trt.ILogger.INFO, "good morning"),
    ):
        log.log(severity, text)
    assert log.warnings == ["Attribute ptx not found in plugin node!"]
    assert log.errors == told == ["no kernel"]
    nodes = [h.make_node("Identity", ["n"], [name], name="copy") for name in "ab"]
    n, a, b = (value(name, T.INT64, [4]) for name in "nab")
    assert build_engine(job(model(nodes, [n], [a, b]), tmp_path)).messages == ()


def _outside(folder: Path, offset: str = "64", length: str = "64") -> Job:
    """A model with its weight in another folder, at an offset."""
    weight = h.make_tensor("w", T.FLOAT, [4, 4], bytes(64), raw=True)
    weight.ClearField("raw_data")
    weight.data_location = T.EXTERNAL
    for key, text in (("location", "deep/w.bin"), ("offset", offset), ("length", length)):
        weight.external_data.add(key=key, value=text)
    node = h.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (value(name, T.FLOAT, [4, 4]) for name in "xy")
    (folder / "artefact").mkdir(exist_ok=True)
    weights = folder / "checkpoint"
    (weights / "deep").mkdir(parents=True, exist_ok=True)
    (weights / "deep" / "w.bin").write_bytes(bytes(64) + bytes(range(64)))
    made = model([node], [x], [y], [weight])
    return job(made, folder / "artefact", weights=str(weights))


@pytest.mark.full
def test_weights_lie_wherever_they_lie(tmp_path: Path) -> None:
    outside = _outside(tmp_path)
    build_engine(outside)
    inline = onnx.load(outside.onnx, load_external_data=False)
    inline.graph.initializer[0].CopyFrom(
        h.make_tensor("w", T.FLOAT, [4, 4], bytes(range(64)), raw=True)
    )
    (tmp_path / "inline").mkdir()
    again = job(inline, tmp_path / "inline")
    build_engine(again)
    assert Path(again.engine).read_bytes() == Path(outside.engine).read_bytes()
    zeros = h.make_tensor("w", T.FLOAT, [4, 4], bytes(64), raw=True)
    inline.graph.initializer[0].CopyFrom(zeros)
    other = job(inline, tmp_path / "inline")
    build_engine(other)
    assert Path(other.engine).read_bytes() != Path(outside.engine).read_bytes()


@pytest.mark.full
def test_weights_that_are_not_there(tmp_path: Path) -> None:
    outside = _outside(tmp_path)
    nowhere = outside.model_copy(update={"weights": None})  # beside the model
    refused_and_nothing_left(tmp_path, lambda: build_engine(nowhere), "weight w")
    short = _outside(tmp_path, offset="100")
    refused_and_nothing_left(tmp_path, lambda: build_engine(short), "at least 164")
    small = _outside(tmp_path, length="32")
    refused_and_nothing_left(tmp_path, lambda: build_engine(small), "size 32", 1)
    (tmp_path / "checkpoint" / "deep" / "w.bin").write_bytes(b"")
    refused_and_nothing_left(tmp_path, lambda: build_engine(short), "weight w")


@pytest.mark.parametrize(
    "spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"no model" * 9)]
)
def test_what_is_no_model(spoil: Callable[[Path], Any], tmp_path: Path) -> None:
    wanted = job(attention(), tmp_path)
    spoil(Path(wanted.onnx))
    refused_and_nothing_left(tmp_path, lambda: build_engine(wanted), "model.onnx")


def test_a_good_engine_stays_until_a_better_one_is_there(tmp_path: Path) -> None:
    wanted = job(attention(), tmp_path)
    Path(wanted.engine).write_text("the old one")
    bad = wanted.model_copy(update={"attentions": 2})
    refused_and_nothing_left(tmp_path, lambda: build_engine(bad), "1 attention layers", 1)
    assert Path(wanted.engine).read_text() == "the old one"
    assert Path(wanted.engine).stat().st_size != build_engine(wanted).size
    assert Path(wanted.engine).stat().st_size > 100_000


@pytest.mark.parametrize("name", ["SM90", "SM42", "CURRENT", "hopper"])
def test_architectures_of_which_there_are_none(name: str, tmp_path: Path) -> None:
    wanted = job(attention(), tmp_path, architectures=("SM89", name))
    error = refusal(lambda: build_engine(wanted), f"{name}, which TensorRT-RTX")
    assert "SM89 or SM120" in error.expected and "9.0" in error.expected


def test_tensorrt_that_is_not_installed(tmp_path: Path) -> None:
    wanted = job(attention(), tmp_path, package="tensorrt")
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        error = refusal(lambda: build_engine(wanted), "pip install 'moec[tensorrt]'", 3)
        assert error.where == "TensorRT"
    else:
        refusal(lambda: build_engine(wanted), "builds for the GPU that it runs on")


def test_no_gpu_to_build_for(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    wanted = job(attention(), tmp_path, architectures=())
    error = refusal(lambda: build_engine(wanted), "name the architectures", 3)
    assert "CUDA driver" in error.found and "SM89" in error.expected


@pytest.mark.parametrize("gpu", ["SM90", "SM89"])
def test_the_gpu_here(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_architecture_of_first_gpu", lambda: gpu)
    config = trt.Builder(new_log(trt, print)).create_builder_config()
    if gpu == "SM90":
        error = refusal(lambda: api.select_architectures(trt, config, ()), "the GPU here")
        assert "SM90, which TensorRT-RTX" in error.found and "9.0" in error.expected
    else:
        api.select_architectures(trt, config, ())
        assert config.num_compute_capabilities == 1
        assert config.get_compute_capability(0) == trt.ComputeCapability.SM89


@pytest.mark.parametrize("engine", ["nowhere/x.engine", "model.onnx/x.engine", ""])
def test_an_engine_that_cannot_be_written(engine: str, tmp_path: Path) -> None:
    wanted = job(attention(), tmp_path, engine=str(tmp_path / engine))
    refused_and_nothing_left(tmp_path, lambda: build_engine(wanted), engine or "a folder")
