"""A manifest from a stranger names files of its folder alone, and session options of moec alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.artefact.artefact import open_artefact
from moec.artefact.opening.rules import stays_inside
from moec.artefact.session_options import session_options
from tests.damage import manifest, put, sealed, tensor_refs
from tests.refusals import refusal

NAMES = [
    "../x", "a/../../x", "/etc/passwd", "..", ".", "", "./x", "a//b", "a/", "a\\b", "x\0", "x\n",
    "\x1b[2Jx", "x" * 300, "/".join("x" * 3000), "\udcff",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[:20] for name in NAMES])
def test_names_that_leave_the_folder(name: str) -> None:
    assert not stays_inside(name)


@pytest.mark.parametrize("name", ["x", "a/b.safetensors", "genai/model.onnx", "..x", "x y", "é"])
def test_names_that_stay(name: str) -> None:
    assert stays_inside(name)


def _rename(field: str, name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        values = json.loads(path.read_text())
        rows = values["weights"]["shards"] if field == "shards" else values[field]
        rows[name] = next(iter(rows.values()), {"size": 1, "sha256": ""})
        path.write_text(json.dumps(values))

    return change


def _engine(**changed: Any) -> Callable[[Path], object]:
    built = {
        "package": "tensorrt", "version": "1", "architectures": [], "size": 1, "seconds": {},
        "peak_bytes": 0, "layers": 0, "layer_types": {}, "precisions": {},
    }  # fmt: skip
    value = {"file": "engine/model.engine", "built": built} | changed
    return manifest("engines", {"model": value})


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file above": (_rename("files", "../../.bashrc"), ".bashrc"),
    "an absolute file": (_rename("files", "/etc/passwd"), "/etc/passwd"),
    "a shard above": (_rename("shards", "../secret.safetensors"), "secret"),
    "an absolute shard": (_rename("shards", "/x.safetensors"), "/x.safetensors"),
    "a tensor above": (
        tensor_refs(lambda refs: refs["norm.weight"].update(file="../x")),
        "norm.weight",
    ),
    "an engine above": (_engine(file="../../evil.engine"), "evil.engine"),
    "a plugin elsewhere": (_engine(plugins=["/tmp/evil.so"]), "evil.so"),
    "an engine's file above": (_engine(files={"../x": {"size": 1, "sha256": ""}}), "../x"),
    "a relative folder of weights": (manifest("weights.folder", "weights"), "weights.folder"),
    "a folder of weights with ..": (manifest("weights.folder", "/a/../b"), "weights.folder"),
    "a relative checkpoint": (manifest("checkpoint", "../x"), "checkpoint"),
}


@pytest.mark.parametrize("case", CASES)
def test_names_outside_the_artefact_are_refused(artefact: Path, case: str) -> None:
    damage, names = CASES[case]
    damage(artefact)
    refusal(lambda: open_artefact(artefact), names)


def test_a_file_of_a_size_that_moec_never_writes_is_refused(artefact: Path) -> None:
    """A sparse file takes no room on a disk, and would take gigabytes of memory."""
    size = 1 << 40
    with (artefact / "model.onnx").open("ab") as file:
        file.truncate(size)
    manifest("files", {"model.onnx": {"size": size, "sha256": ""}})(artefact)
    refusal(lambda: open_artefact(artefact), "1,099,511,627,776 bytes")


OPTIONS: dict[str, tuple[str, object]] = {
    "a file to write": ("entries.session.collect_node_memory_stats_to_file", "/tmp/moec-written"),
    "a profile": ("entries.session.enable_profiling", "1"),
    "another value": ("entries.session.disable_prepacking", "0"),
    "another optimizer": ("entries.optimization.disable_specified_optimizers", "x"),
    "a folder": ("entries.session.model_external_initializers_file_folder_path", "/"),
    "a custom op": ("entries.session.register_custom_ops", "/tmp/evil.so"),
    "another order": ("execution_order", "DEFAULT"),
    "another pattern": ("enable_mem_pattern", True),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_foreign_session_options_are_refused(artefact: Path, case: str) -> None:
    field, value = OPTIONS[case]
    path = artefact / "manifest.json"
    values = json.loads(path.read_text())
    chosen = values["presets"]["lean"]
    kind, _, key = field.partition(".")
    if key:
        chosen[kind][key] = value
    else:
        chosen[kind] = value
    path.write_text(json.dumps(values))
    refusal(lambda: moec.open_session(artefact), "presets")


def test_a_further_set_of_session_options_is_refused(artefact: Path) -> None:
    path = artefact / "manifest.json"
    values = json.loads(path.read_text())
    values["presets"]["mine"] = {"entries": {"session.x": "1"}}
    path.write_text(json.dumps(values))
    refusal(lambda: open_artefact(artefact), "mine: session.x=1")


@pytest.mark.parametrize("kinds", [(True, False), (True, True), (False, True)])
def test_session_options_of_other_weights_are_refused(
    artefact: Path, kinds: tuple[bool, bool]
) -> None:
    """moec writes such tables too, for integers and FP8; this artefact has neither."""
    table = {name: each.model_dump() for name, each in session_options(*kinds).items()}
    put("manifest.json", "presets", table)(artefact)
    sealed(artefact)
    error = refusal(lambda: open_artefact(artefact), "presets")
    assert error.expected.startswith("lean, fast, as moec")


@pytest.mark.full
def test_an_artefact_that_onnx_runtime_does_not_run_has_no_session_options(
    sound: Path, tmp_path: Path
) -> None:
    art = moec.export(sound, "torch", "bf16", tmp_path / "art")
    assert not art.manifest.presets
    table = {name: each.model_dump() for name, each in session_options(False).items()}
    put("manifest.json", "presets", table)(art.path)
    sealed(art.path)
    refusal(lambda: open_artefact(art.path), "presets")
