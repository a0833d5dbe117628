"""Engines of TensorRT-RTX, built for GPUs that are not here; none of them is run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.artefact.artefact import open_artefact, verify_files
from moec.artefact.engine_job import Job
from moec.artefact.engine_options import EngineOptions
from moec.exporters import export
from moec.exporters.engines import build_engines
from moec.exporters.tensorrt import build
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")

ROOT = Path(__file__).parents[2]
#: a chunked and a global layer
TWO_LAYERS = {
    "layers": 2, "attention": "LG", "rope": "RN", "qk_norm": "Q-", "temperature": "-T",
}  # fmt: skip
#: stands in for TensorRT's own headers: see the file
HEADERS = ROOT / "tests/exporters/tensorrt_plugin/include"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_tiny_scout_builds_for_two_gpus(
    precision: str, tiny: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    command = (
        "build", "--checkpoint", tiny, "--target", "tensorrt-rtx",
        "--precision", precision, "--no-validate", "--out", tmp_path / "art",
    )  # fmt: skip
    assert cli(*command) == (0, "")
    art = open_artefact(tmp_path / "art")
    verify_files(art)
    for part in ("model", "vision"):
        engine = art.manifest.engines[part]
        assert engine.file == f"engine/{part}.engine" and list(engine.files) == [engine.file]
        assert engine.built.architectures == ("SM89", "SM120")
    built = art.manifest.engines["model"].built
    layers = art.manifest.spec.text.layers
    assert built.layer_types["ATTENTION_OUTPUT"] == layers and not built.messages
    assert built.layer_types["KV_CACHE_UPDATE"] == 2 * layers
    assert built.precisions["BF16"] and bool(built.precisions.get("FP8")) == (precision == "fp8")
    assert built.layer_types.get("CONDITION", 0) == (layers if precision == "bf16" else 0)
    experts = 1 if precision == "bf16" else 16  # tensors of a layer's experts
    assert len(art.manifest.engines["model"].bindings) == 2 * layers * experts


@pytest.mark.full
@pytest.mark.parametrize(
    "name, precision",
    [
        ("scout", "bf16"),
        pytest.param("scout", "fp8", marks=pytest.mark.slow),
        pytest.param("maverick", "fp8", marks=pytest.mark.slow),
    ],
)
def test_two_layers_of_full_width_build_without_weights(
    name: str, precision: str, tmp_path: Path
) -> None:
    spec = PRESETS[name]
    text = spec.text.model_copy(update=TWO_LAYERS)
    tower = spec.vision if (name, precision) == ("scout", "fp8") else None
    spec = spec.model_copy(update={"text": text, "vision": tower})
    art = moec.export(spec, "tensorrt-rtx", precision, tmp_path / "art")
    engine = art.manifest.engines["model"]
    assert engine.built.size < 60e6 and engine.built.peak_bytes < 3e9, "weights are not in it"
    experts = "layers.1.moe.down" if precision == "bf16" else "layers.1.moe.down[15]"
    assert {experts, "embed.weight"} <= set(engine.bindings)
    assert ("vision" in art.manifest.engines) == (tower is not None)


@pytest.fixture
def narrow() -> ModelSpec:
    """Two layers of the fixture, text alone."""
    text = PRESETS["tiny-scout"].text.model_copy(update=TWO_LAYERS)
    return PRESETS["tiny-scout"].model_copy(update={"text": text, "vision": None})


@pytest.mark.slow
def test_experts_in_the_plugin_and_again_for_another_gpu(
    narrow: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE", str(HEADERS))
    options = EngineOptions(architectures=("SM89",))
    art = moec.export(
        narrow, "tensorrt-rtx", "fp8", tmp_path / "art", scheme="mixed", options=options
    )
    engine = art.manifest.engines["model"]
    assert engine.plugins == ("engine/plugin/libmoec_plugin.so",)
    assert engine.built.layer_types["PLUGIN_V3"] == 2
    assert {"engine/model.engine", "engine/plugin/build.sh"} <= set(engine.files)
    again = build_engines(art.path, architectures=["SM120"])
    verify_files(open_artefact(art.path))
    assert again.manifest.engines["model"].files != engine.files

    monkeypatch.setenv("CXX", "nothing")
    with pytest.raises(MoecError, match=r"compiler nothing") as caught:
        build_engines(art.path)
    assert caught.value.exit_code == 3
    verify_files(open_artefact(art.path))  # what was there stays


@pytest.mark.full
def test_the_plugin_wants_headers(
    narrow: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE", str(tmp_path / "none"))
    with pytest.raises(MoecError, match=r"NvInferRuntime\.h") as caught:
        moec.export(narrow, "tensorrt-rtx", "fp8", tmp_path / "art", scheme="mixed")
    assert caught.value.exit_code == 3 and "TENSORRT_INCLUDE" in caught.value.next_step
    assert f"moec engine {tmp_path / 'art'}" in caught.value.next_step
    assert not open_artefact(tmp_path / "art").manifest.engines, "all but the engine is there"


@pytest.mark.slow
def test_engines_can_be_built_later_and_again(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(context=64, piece=64, build=False)
    art = moec.export(sound, "tensorrt-rtx", "bf16", tmp_path / "art", options=options)
    assert not art.manifest.engines
    done = build_engines(art.path, architectures=["SM86"])
    verify_files(open_artefact(art.path))
    assert done.manifest.to_json() == open_artefact(art.path).manifest.to_json()
    engine = done.manifest.engines["model"]
    assert engine.built.architectures == ("SM86",) and (art.path / engine.file).is_file()
    with pytest.raises(MoecError, match="SM90") as caught:
        build_engines(art.path, architectures=["SM90"])
    assert caught.value.exit_code == 2
    assert open_artefact(art.path).manifest.digest == done.manifest.digest, "the old engine stays"

    real = build.build_engine

    def second_fails(job: Job, progress: Any) -> Any:
        if job.engine.endswith("vision.engine"):
            raise KeyboardInterrupt
        return real(job, progress)

    monkeypatch.setattr(build, "build_engine", second_fails)
    with pytest.raises(KeyboardInterrupt):
        build_engines(art.path, architectures=["SM89"])
    verify_files(open_artefact(art.path))
    assert not [each for each in art.path.iterdir() if each.name.startswith(".")]
    monkeypatch.undo()

    (art.path / engine.file).unlink()
    found = open_artefact(art.path)  # the rest is as it was
    with pytest.raises(MoecError, match="moec engine") as caught:
        verify_files(found)
    assert caught.value.exit_code == 1
    verify_files(build_engines(art.path))


@pytest.mark.slow
def test_an_engine_without_weights_serves_each_checkpoint(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(context=64, piece=64)
    spec = moec.load_spec(sound)
    art = moec.export(spec, "tensorrt-rtx", "bf16", tmp_path / "art", options=options)
    assert art.manifest.options and art.manifest.options.bindings == "all"
    monkeypatch.setattr(export, "build_engines", lambda *given: pytest.fail("nothing to build"))
    bound = moec.bind(art.path, sound)
    assert bound.manifest.engines == art.manifest.engines
    verify_files(open_artefact(bound.path))
    assert bound.manifest.weights.mode == "in-place"


@pytest.mark.slow
def test_binding_may_leave_the_engine_for_later(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(context=64, piece=64)
    art = moec.export(sound, "tensorrt-rtx", "bf16", tmp_path / "art", options=options)
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(MoecError, match="not installed"):
        moec.bind(art.path, sound)
    verify_files(open_artefact(art.path))
    assert not moec.bind(art.path, sound, engine=False).manifest.engines


def test_an_artefact_without_engines_has_none_to_build(built: Path) -> None:
    with pytest.raises(MoecError, match="target onnx"):
        build_engines(built)


def test_without_the_package_the_build_says_so_first(
    sound: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    code, err = cli(
        "build", "--checkpoint", sound, "--target", "tensorrt", "--out", tmp_path / "art"
    )
    assert code == 3 and "moec[tensorrt]" in err and "--no-engine" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, named",
    [
        (("--sm", "SM90"), "compute capability 9.0"),
        pytest.param(("--sm", "SM75"), "bf16", marks=pytest.mark.slow),
        (("--context", "0"), "--context"),
        (("--piece", "70", "--context", "64"), "--piece"),
        (("--bindings", "some"), "--bindings"),
        (("--sm", "foo"), "--sm"),
        (("--sm", "SM89", "--sm", "SM89"), "twice"),
        (("--target", "tensorrt", "--no-engine", "--sm", "SM89"), "--target tensorrt-rtx"),
        (
            (
                "--checkpoint",
                "examples/tiny-scout",
                "--precision",
                "fp8",
                "--scheme",
                "mixed",
                "--bindings",
                "none",
            ),
            "experts or all",
        ),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(
    options: tuple[str, ...], named: str, sound: Path, tmp_path: Path,
    cli: Callable[..., tuple[int, str]],
) -> None:  # fmt: skip
    code, err = cli(
        "build", "--checkpoint", sound, "--target", "tensorrt-rtx", "--out", tmp_path / "art",
        *options,
    )  # fmt: skip
    assert code == 2 and named in err, err
    left = list(tmp_path.iterdir())
    assert not left or not open_artefact(tmp_path / "art").manifest.engines


@pytest.mark.full
def test_nothing_imports_tensorrt_at_start() -> None:
    code = "import sys, moec.exporters.export\n"
    code += "print([m for m in sys.modules if m.startswith('tensorrt')])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
