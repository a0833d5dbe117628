"""Engines and plugins are native code: only what this user built here is loaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moec.artefact.artefact import Artefact, file_of
from moec.artefact.opening.native import check_native
from moec.runtime.engines.tensorrt.run import tensorrt_engine
from moec.weights.trust import records
from tests.refusals import refusal
from tests.runtime.engines.tensorrt.fake import Package, with_engines


@pytest.fixture
def foreign(
    art: Artefact, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], object]:
    """Opens an engine that this user neither built nor trusts."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    records.allow_folder(art.weights_folder)
    with_them = replace(with_engines(art, package.plans), trust_engines=False)
    return lambda: tensorrt_engine(with_them, device="cpu", trt=package)


def test_a_strangers_engine_is_refused_before_it_loads(
    foreign: Callable[[], object], package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(package), "Runtime", None, raising=False)
    error = refusal(foreign, "model.engine")
    assert "moec engine" in error.next_step and "--trust-engines" in error.next_step


def test_an_engine_that_this_user_built_is_loaded(
    foreign: Callable[[], object], art: Artefact
) -> None:
    records.allow("native", file_of(art.path / "model.engine").sha256)
    assert foreign()


def test_a_plugin_counts_by_its_bytes(art: Artefact, tmp_path: Path) -> None:
    plugin = art.path / "plugin.so"
    plugin.write_bytes(b"native")
    refusal(lambda: check_native(art, ["plugin.so"]), "plugin.so")
    records.allow("native", file_of(plugin).sha256)
    check_native(art, ["plugin.so"])
    plugin.write_bytes(b"other!")
    refusal(lambda: check_native(art, ["plugin.so"]), "plugin.so")
    check_native(replace(art, trust_engines=True), ["plugin.so"])
    plugin.unlink()
    plugin.symlink_to("/etc/passwd")
    refusal(lambda: check_native(replace(art, trust_engines=True), ["plugin.so"]), "plugin.so")
    plugin.unlink()
