"""Engines of TensorRT-RTX, built for GPUs that are not here; none of them is run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moec
from moec.exporters.artefact import open_artefact, verify_files
from moec.exporters.export import build_engines
from moec.exporters.tensorrt.options import EngineOptions
from moec.spec.errors import MoecError
from moec.spec.presets import PRESETS

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")

ROOT = Path(__file__).parents[2]
#: stands in for TensorRT's own headers: see the file
HEADERS = ROOT / "tests/exporters/tensorrt_plugin/include"


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_tiny_scout_builds_for_two_gpus(
    precision: str, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    command = (
        "build", "--checkpoint", "examples/tiny-scout", "--target", "tensorrt-rtx",
        "--precision", precision, "--no-validate", "--out", tmp_path / "art",
    )  # fmt: skip
    assert cli(*command) == (0, "")
    art = open_artefact(tmp_path / "art")
    verify_files(art)
    for part in ("model", "vision"):
        engine = art.manifest.engines[part]
        assert engine.file in art.manifest.files
        assert engine.built.architectures == ("SM89", "SM120")
    built = art.manifest.engines["model"].built
    assert built.layer_types["ATTENTION_OUTPUT"] == 8 and not built.messages
    assert built.layer_types["KV_CACHE_UPDATE"] == 16
    assert built.precisions["BF16"] and bool(built.precisions.get("FP8")) == (precision == "fp8")
    assert built.layer_types.get("CONDITION", 0) == (8 if precision == "bf16" else 0)
    experts = 1 if precision == "bf16" else 16  # tensors of a layer's experts
    assert len(art.manifest.engines["model"].bindings) == 2 * 8 * experts


@pytest.mark.parametrize(
    "name, precision", [("scout", "fp8"), ("scout", "bf16"), ("maverick", "fp8")]
)
def test_two_layers_of_full_width_build_without_weights(
    name: str, precision: str, tmp_path: Path
) -> None:
    spec = PRESETS[name]
    text = spec.text.model_copy(update={"layers": 2})
    tower = spec.vision if (name, precision) == ("scout", "fp8") else None
    spec = spec.model_copy(update={"text": text, "vision": tower})
    art = moec.export(spec, "tensorrt-rtx", precision, tmp_path / "art")
    engine = art.manifest.engines["model"]
    assert engine.built.size < 60e6 and engine.built.peak_bytes < 3e9, "weights are not in it"
    experts = "layers.1.moe.down" if precision == "bf16" else "layers.1.moe.down[15]"
    assert {experts, "embed.weight"} <= set(engine.bindings)
    assert ("vision" in art.manifest.engines) == (tower is not None)


def test_experts_in_the_plugin(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE", str(HEADERS))
    wide = PRESETS["tiny-scout"].text.model_copy(update={"layers": 2})
    spec = PRESETS["tiny-scout"].model_copy(update={"text": wide, "vision": None})
    art = moec.export(spec, "tensorrt-rtx", "fp8", tmp_path / "art", scheme="mixed")
    engine = art.manifest.engines["model"]
    assert engine.plugins == ("plugin/libmoec_plugin.so",)
    assert engine.built.layer_types["PLUGIN_V3"] == 2
    assert {"plugin/build.sh", "plugin/libmoec_plugin.so"} <= set(art.manifest.files)


def test_the_plugin_wants_headers(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE", str(tmp_path / "none"))
    spec = PRESETS["tiny-scout"]
    with pytest.raises(MoecError, match=r"NvInferRuntime\.h") as caught:
        moec.export(spec, "tensorrt-rtx", "fp8", tmp_path / "art", scheme="mixed")
    assert caught.value.exit_code == 3 and "TENSORRT_INCLUDE" in caught.value.next_step
    assert not list(tmp_path.iterdir())


def test_engines_can_be_built_later(sound: Path, tmp_path: Path) -> None:
    options = EngineOptions(context=64, piece=64, build=False)
    art = moec.export(sound, "tensorrt-rtx", "bf16", tmp_path / "art", options=options)
    assert not art.manifest.engines
    done = build_engines(art.path, ("SM86",))
    verify_files(open_artefact(art.path))
    assert done.manifest == open_artefact(art.path).manifest
    engine = done.manifest.engines["model"]
    assert engine.built.architectures == ("SM86",) and (art.path / engine.file).is_file()
    with pytest.raises(MoecError, match="SM90") as caught:
        build_engines(art.path, ("SM90",))
    assert caught.value.exit_code == 2
    assert open_artefact(art.path).manifest == done.manifest, "the old engine stays"


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
        (("--sm", "SM75"), "bf16"),
        (("--context", "0"), "--context"),
        (("--piece", "70", "--context", "64"), "--piece"),
        (("--bindings", "some"), "--bindings"),
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
    assert code == 2 and named in err and not list(tmp_path.iterdir()), err


def test_nothing_imports_tensorrt_at_start() -> None:
    code = "import sys, moec.exporters.export\nprint([m for m in sys.modules if 'tensorrt_' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "tensorrt_rtx" not in done.stdout and "bindings'" not in done.stdout.replace(
        "moec.exporters.tensorrt.bindings'", ""
    )
