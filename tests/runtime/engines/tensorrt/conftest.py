"""Artefacts whose engines are those of the fake package, and sessions over them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.artefact.artefact import Artefact
from moec.artefact.engine_options import EngineOptions
from moec.runtime.engines.tensorrt import opening as tensorrt_open
from moec.runtime.engines.tensorrt.run import ENGINE, tensorrt_engine
from moec.runtime.open import artefact_session, eager_session
from moec.runtime.session import Session
from moec.spec.model import ModelSpec
from moec.weights.random import write_random_checkpoint
from tests.damage import SPEC
from tests.runtime.engines.tensorrt.fake import ALIGNED, Package, Plan, plan_of, with_engines

#: chunks of 8; four layers, the last of which sees everything
SMALL = SPEC.model_copy(
    update={
        "text": SPEC.text.model_copy(
            update={"layers": 4, "experts": SPEC.text.experts.model_copy(update={"count": 3})}
        )
    }
)
OPTIONS = EngineOptions(context=40, batch=3, piece=5, tiles=2, build=False)


def built(
    spec: ModelSpec, folder: Path, precision: str = "fp32", options: EngineOptions = OPTIONS,
    **chosen: Any,
) -> Artefact:  # fmt: skip
    """An artefact of random weights; its ONNX alone."""
    write_random_checkpoint(spec, folder / "checkpoint")
    return moec.export(
        folder / "checkpoint", target="tensorrt-rtx", precision=precision, out=folder / "art",
        options=options, **chosen,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory on the CPU is aligned to less."""
    monkeypatch.setattr(tensorrt_open, "ALIGNED", ALIGNED)
    monkeypatch.setattr("moec.runtime.engines.tensorrt.run.ALIGNED", ALIGNED)


@pytest.fixture(scope="session")
def art(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return built(SMALL, tmp_path_factory.mktemp("small"))


@pytest.fixture
def plans(art: Artefact) -> dict[str, Plan]:
    return {part: plan_of(art, part) for part in ("model", "vision")}


@pytest.fixture
def package(plans: dict[str, Plan]) -> Package:
    return Package(plans)


@pytest.fixture
def session(art: Artefact, package: Package) -> Session:
    return session_of(art, package)


@pytest.fixture(scope="session")
def reference(art: Artefact) -> Session:
    return eager_session(art.manifest.spec, art.entries(), "fp32")


def session_of(artefact: Artefact, package: Package) -> Session:
    """A session on the engines of the fake `package`."""
    with_them = with_engines(artefact, package.plans)
    fake = replace(
        ENGINE,
        open=lambda art, part, device, options, taps: tensorrt_engine(art, part, device, package),
    )
    return artefact_session(with_them, engine=fake)


def opening(
    artefact: Artefact, package: Package, **changes: Any
) -> Callable[[], Callable[[Mapping[str, Any]], object]]:
    """Open the decoder's engine, of which `changes` say how it was built."""
    with_them = with_engines(artefact, package.plans, **changes)
    return partial(tensorrt_engine, with_them, device="cpu", trt=package)
