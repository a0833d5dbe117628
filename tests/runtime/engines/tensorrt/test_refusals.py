"""What is refused: machines, versions, files and engines that do not fit, and calls that fail."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moec.artefact.artefact import Artefact
from moec.runtime.engines.tensorrt.run import tensorrt_engine
from moec.runtime.open import artefact_session
from moec.runtime.session import Session
from tests.refusals import refusal
from tests.runtime.engines.tensorrt.conftest import OPTIONS, opening, session_of
from tests.runtime.engines.tensorrt.fake import VERSION, Package, Plan, with_engines

Change = Callable[[Plan], object]


# ---------------------------------------------------------------- this machine


def test_an_artefact_without_engines(art: Artefact, package: Package) -> None:
    refusal(lambda: tensorrt_engine(art, device="cpu", trt=package), "moec engine")


def test_a_package_that_is_not_installed(
    art: Artefact, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    _pretend_gpu(monkeypatch, 8, 9)
    with_them = with_engines(art, package.plans)
    refusal(lambda: tensorrt_engine(with_them), "pip install 'moec[tensorrt-rtx]'", 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(art: Artefact, package: Package) -> None:
    with_them = with_engines(art, package.plans)
    refusal(lambda: tensorrt_engine(with_them), "which finds no GPU", 3)


def test_a_session_on_the_cpu(art: Artefact, package: Package) -> None:
    with_them = with_engines(art, package.plans)
    refusal(lambda: tensorrt_engine(with_them, device="cpu"), "device cuda", 3)


def test_a_gpu_that_it_was_not_built_for(
    art: Artefact, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_gpu(monkeypatch, 9, 0)
    with_them = with_engines(art, package.plans)
    error = refusal(lambda: tensorrt_engine(with_them, trt=package), "SM90", 3)
    assert "SM89 or SM120" in error.expected and "Pretended" in error.found


def test_another_version(art: Artefact, package: Package) -> None:
    error = refusal(opening(art, package, version="1.6.0"), VERSION, 3)
    assert "1.6.0" in error.expected


def _pretend_gpu(monkeypatch: pytest.MonkeyPatch, *capability: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended GPU")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("rtx", [True, False])
@pytest.mark.parametrize("content", [b"engine of", b"", None])
def test_a_file_that_is_no_engine(
    art: Artefact, package: Package, rtx: bool, content: bytes | None
) -> None:
    package = Package(package.plans, rtx)
    with_them = with_engines(art, package.plans)
    file = with_them.path / "model.engine"
    file.unlink() if content is None else file.write_bytes(content)
    error = refusal(lambda: tensorrt_engine(with_them, "model", "cpu", package), "model.engine", 1)
    assert ("magicTag" in error.found) == bool(content), "TensorRT's own words, if it had any"


def test_words_of_an_earlier_refusal_are_not_said_again(art: Artefact, package: Package) -> None:
    with_them = with_engines(art, package.plans)
    file = with_them.path / "model.engine"
    file.write_bytes(b"engine of")
    refusal(lambda: tensorrt_engine(with_them, "model", "cpu", package), "magicTag", 1)
    file.unlink()
    refusal(lambda: tensorrt_engine(with_them, "model", "cpu", package), "No such file", 1)


def test_what_tensorrt_rtx_knows_of_an_engine_is_said_where_its_log_says_nothing(
    art: Artefact, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "says", lambda text: False)
    with_them = with_engines(art, package.plans)
    (with_them.path / "model.engine").write_bytes(b"engine of")
    refusal(lambda: tensorrt_engine(with_them, "model", "cpu", package), "MALFORMED_ENGINE", 1)


def test_plugins_are_loaded_first_and_once(
    art: Artefact, package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("moec.exporters.tensorrt.api.preload", lambda: None)
    with_them = with_engines(art, package.plans)
    engine = with_them.manifest.engines["model"].model_copy(update={"plugins": ("lib.so",)})
    update = {"engines": {"model": engine}}
    with_them = replace(
        with_them, path=tmp_path, manifest=with_them.manifest.model_copy(update=update)
    )
    (tmp_path / "model.engine").write_bytes(b"engine of model")
    package.log = _silent(package)
    refusal(lambda: tensorrt_engine(with_them, "model", "cpu", package), "lib.so")
    assert not package.runtimes
    (tmp_path / "lib.so").write_bytes(b"")
    for _ in range(2):
        tensorrt_engine(with_them, "model", "cpu", package)
    assert package.libraries == [str(tmp_path / "lib.so")]


def test_a_process_has_one_artefact_with_a_plugin(
    art: Artefact, package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("moec.exporters.tensorrt.api.preload", lambda: None)
    package.log = _silent(package)
    first, second = (_with_plugin(art, package, tmp_path / name) for name in ("first", "second"))
    tensorrt_engine(first, "model", "cpu", package)
    error = refusal(lambda: tensorrt_engine(second, "model", "cpu", package), "second/lib.so")
    assert "first/lib.so" in error.found and "new process" in error.next_step
    opening(art, package)()  # without a plugin it disturbs nobody
    tensorrt_engine(first, "model", "cpu", package)
    (first.path / "lib.so").write_bytes(b"built again")
    refusal(lambda: tensorrt_engine(first, "model", "cpu", package), "changed since")


def _with_plugin(art: Artefact, package: Package, folder: Path) -> Artefact:
    """`art` as if it lay in `folder`, beside the library of its plugin."""
    folder.mkdir()
    (folder / "lib.so").write_bytes(b"")
    (folder / "model.engine").write_bytes(b"engine of model")
    with_them = with_engines(art, package.plans)
    engine = with_them.manifest.engines["model"].model_copy(update={"plugins": ("lib.so",)})
    manifest = with_them.manifest.model_copy(update={"engines": {"model": engine}})
    return replace(with_them, path=folder, manifest=manifest)


def _silent(package: Package) -> object:
    class Log(package.ILogger):  # type: ignore[name-defined, misc]
        def log(self, severity: int, msg: str) -> None:
            pass

    return Log()


# ---------------------------------------------------------------- engines


#: the last of the weights that are inputs
WEIGHT = "weight"


def _named(plan: Plan, name: str) -> str:
    return list(plan.weights)[-1] if name == WEIGHT else name


def _without(name: str) -> Change:
    return lambda plan: plan.tensors.pop(_named(plan, name))


def _with(name: str, **changes: object) -> Change:
    def change(plan: Plan) -> None:
        at = _named(plan, name)
        plan.tensors[at] = replace(plan.tensors.get(at, plan.tensors["logits"]), **changes)  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_without("past_lengths"), "past_lengths"),
        (_without("logits"), "logits"),
        (_without(WEIGHT), ".moe."),
        (_with("other"), "other"),
        (_with("input_ids", dtype="INT32"), "torch.int32"),
        (_with("logits", dtype="BF16"), "torch.bfloat16"),
        (_with("logits", given=True), "an input"),
        (_with("past.0.key", shape=("batch", 2, 16, 8)), "[-1, 2, 8, 8]"),
        (_with(WEIGHT, dtype="HALF"), "torch.float16"),
        (_with(WEIGHT, shape=(3,)), "[3]"),
        (_with("logits", alias="past.0.key"), "memory of its own"),
        (_with("present.0.key", alias="past.1.key"), "over past.0.key"),
    ],
)
def test_an_engine_of_another_artefact(
    art: Artefact, package: Package, change: Change, names: str
) -> None:
    with_them = with_engines(art, package.plans)
    change(package.plans["model"])
    refusal(lambda: tensorrt_engine(with_them, "model", "cpu", package), names, 1)


def test_weights_that_changed(art: Artefact, package: Package) -> None:
    manifest = art.manifest
    gone = manifest.weights.model_copy(update={"mode": "unbound"})
    unbound = replace(art, manifest=manifest.model_copy(update={"weights": gone}))
    refusal(opening(unbound, package), "bound weights")


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize(
    ("feeds", "name"),
    [
        ({"input_ids": (OPTIONS.batch + 1, 1)}, "input_ids"),
        ({"input_ids": (0, 1)}, "input_ids"),
        ({"input_ids": (1, OPTIONS.piece + 1)}, "input_ids"),
        ({"input_ids": (2, 2)}, "input_ids"),
        ({"past.3.key": (1, 2, OPTIONS.context + 8, 8)}, "past.3.key"),
        ({"logit_index": (1, 9)}, "logit_index"),
    ],
)
def test_shapes_that_it_was_not_built_for(
    session: Session, feeds: dict[str, tuple[int, ...]], name: str
) -> None:
    rows = feeds.get("input_ids", (1, 1))[0]
    free = replace(session, limits=replace(session.limits, batch=None))
    cache = free.new_cache(rows, 8)
    shapes = {"input_ids": (1, 1), "past_lengths": (rows,), "global.last": (rows,),
              "ring.last": (rows,), "logit_index": (rows, 1)} | feeds  # fmt: skip
    given = cache.tensors | {n: torch.zeros(shape) for n, shape in shapes.items()}
    error = refusal(lambda: session.run(given), name)
    assert "--batch, --piece or --context" in error.next_step and " to [" in error.expected


def test_more_rows_than_it_was_built_for(session: Session, package: Package) -> None:
    rows = [[5, 6]] * (OPTIONS.batch + 1)
    for call in (session.generate, session.prefill):
        error = refusal(lambda: call(rows), f"--batch {OPTIONS.batch + 1}")  # noqa: B023
        assert not package.plans["model"].calls and str(OPTIONS.batch) in error.expected
    assert len(session.logits(rows)) == len(rows), "prompts go row by row, and need no step"


def test_a_context_holds_all_tokens_but_the_last(session: Session) -> None:
    row = [5] * (OPTIONS.context - 2)
    assert len(session.generate([row], max_new_tokens=3, stop=())[0]) == OPTIONS.context + 1
    refusal(lambda: session.generate([row], max_new_tokens=4), f"--context {OPTIONS.context + 1}")


def test_an_artefact_without_options(art: Artefact) -> None:
    lost = replace(art, manifest=art.manifest.model_copy(update={"options": None}))
    for engine in ("interpreter", "tensorrt"):
        refusal(lambda: artefact_session(lost, engine=engine), "build the artefact again")  # noqa: B023


def test_more_tiles_than_it_was_built_for(session: Session) -> None:
    pixels = torch.zeros(OPTIONS.tiles + 1, 3, 56, 56)
    assert session.vision
    error = refusal(lambda: session.vision()({"pixel_values": pixels}), "pixel_values")  # type: ignore[misc]
    assert "--" not in error.next_step, "no option of a build counts tiles"


@pytest.mark.parametrize("words", ["Error Code 1: the kernel is ill", ""])
def test_a_call_that_fails(art: Artefact, package: Package, words: str) -> None:
    session = session_of(art, package)
    session.logits([[5, 6]])
    package.plans["model"].fails = words
    for _ in range(2):  # the same words again are no news to the log
        refusal(lambda: session.logits([[5, 6]]), words or "the call failed", 1)
    package.plans["model"].fails = "others"
    refusal(lambda: session.logits([[5, 6]]), "others", 1)
    package.plans["model"].fails = None
    session.logits([[5, 6]])
