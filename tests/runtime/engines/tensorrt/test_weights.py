"""The weights that an engine takes as inputs: read once, whole, where TensorRT takes them."""

from pathlib import Path

import pytest
import torch

from moec.artefact.artefact import Artefact
from moec.exporters.onnx.weight_inputs import weights_of
from moec.runtime.engines.tensorrt import weights as tensorrt_weights
from moec.runtime.engines.tensorrt.opening import open_engine
from moec.runtime.engines.tensorrt.weights import load_bindings
from moec.weights.view import STORED, view
from tests.refusals import refusal
from tests.runtime.engines.tensorrt.conftest import SMALL
from tests.runtime.engines.tensorrt.fake import Package, with_engines


def test_bindings_are_stored_tensors_or_experts_of_them(art: Artefact, package: Package) -> None:
    names = list(package.plans["model"].weights)
    assert names and not package.plans["vision"].weights
    experts = [f"layers.1.moe.down[{index}]" for index in range(SMALL.text.experts.count)]
    parts = weights_of(art.manifest, art.stored(), [*names, *experts])
    found = load_bindings(parts, "cpu")
    assert list(found) == list(dict.fromkeys([*names, *experts]))
    for name, tensor in found.items():
        (entry,) = parts[name]
        assert tensor.dtype == STORED[entry.dtype] and torch.equal(tensor, view(entry).flatten())
    whole = view(art.stored()["layers.1.moe.down"])
    assert torch.equal(torch.cat([found[name] for name in experts]), whole.flatten())


def test_each_byte_is_read_once(
    art: Artefact, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[Path, int, int]] = []
    reader = tensorrt_weights.Reader

    class Counting(reader):
        def __call__(self, entry: object, to: object) -> None:
            read.append((entry.file, entry.offset, entry.nbytes))  # type: ignore[attr-defined]
            super().__call__(entry, to)  # type: ignore[arg-type]

    monkeypatch.setattr(tensorrt_weights, "Reader", Counting)
    opened = open_engine(package, with_engines(art, package.plans), "model", "cpu")
    assert len(set(read)) == len(read) == len(opened.weights)
    stored = art.stored()
    whole = [each for name, each in stored.items() if ".moe." in name and len(each.shape) == 3]
    assert sum(size for _, _, size in read) == sum(each.nbytes for each in whole)
    for name, tensor in opened.weights.items():
        for context, _ in opened.profiles:
            assert context.addresses[name] == tensor.data_ptr()


def test_contexts_share_one_memory(art: Artefact, package: Package) -> None:
    package.plans["model"].memory = 5000
    opened = open_engine(package, with_engines(art, package.plans), "model", "cpu")
    first, second = (context for context, _ in opened.profiles)
    assert first.memory == second.memory == (opened.memory.data_ptr(), 5000)
    assert (first.profile, second.profile) == (0, 1)


@pytest.mark.parametrize(
    ("rtx", "part", "layer", "waits"),
    [
        (True, "model", "CAST", ["EAGER", None]),
        (True, "model", "CONDITION", [None, None]),
        (True, "vision", "CAST", [None]),
        (False, "model", "CAST", [None, None]),
    ],
)
def test_steps_that_may_be_captured_wait_for_their_kernels(
    art: Artefact, package: Package, rtx: bool, part: str, layer: str, waits: list[str | None]
) -> None:
    """A graph keeps the kernels that it was captured with: TensorRT-RTX must not change them."""
    with_them = with_engines(art, package.plans, layer_types={layer: 1})
    opened = open_engine(Package(package.plans, rtx), with_them, part, "cpu")
    asked = "dynamic_shapes_kernel_specialization_strategy"
    found = [getattr(getattr(c.config, asked, None), "name", None) for c, _ in opened.profiles]
    assert found == waits


def test_weights_cut_short_are_refused(art: Artefact, tmp_path: Path) -> None:
    entry = art.stored()["layers.0.moe.down"]
    short = tmp_path / "short"
    short.write_bytes(entry.file.read_bytes()[: entry.offset + entry.nbytes - 1])
    damaged = type(entry)(entry.name, entry.dtype, entry.shape, short, entry.offset, entry.nbytes)
    refusal(lambda: load_bindings({"down": (damaged,)}, "cpu"), "ended before")
