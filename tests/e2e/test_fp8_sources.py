"""FP8 checkpoints that other libraries make of the trained fixture: read, run and proven."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moec
from moec.graph_builder.ops.fp8 import dequantize, expert_weight, fp8_moe, rounded
from moec.runtime.open import eager_session
from moec.spec.hf.names import keys
from moec.spec.model import ModelSpec
from moec.spec.names import input_scale_of, scale_of
from moec.weights.name_map import read_model
from moec.weights.shard import TensorEntry
from moec.weights.view import view
from tests.proofs import assert_passed

pytestmark = pytest.mark.full

SOURCES = Path(__file__).parents[1] / "fp8_sources"
#: script and its variant -> inputs of products, share of logits' norm that its own differ by
FORMATS = {
    "compressed_tensors meta": ("token", 0.02),
    "compressed_tensors dynamic": ("token", 0.06),
    "compressed_tensors attention": ("token", 0.06),
    "modelopt": ("tensor", 0.06),
    "fbgemm": ("token", 0.06),
}
#: a process of its own: the libraries patch transformers, and torchvision may lack its operators
RUN = """
import runpy, sys
from moec.runtime.bench.torchvision_ops import declare_torchvision_ops
declare_torchvision_ops()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(
    scope="module",
    params=[
        each if each == "fbgemm" else pytest.param(each, marks=pytest.mark.slow) for each in FORMATS
    ],
)
def made(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A format and a checkpoint in it, as its own library writes it."""
    out = tmp_path_factory.mktemp("made") / "fp8"
    script, _, variant = request.param.partition(" ")
    command = [sys.executable, "-c", RUN, SOURCES / f"make_{script}.py", tiny, out]
    done = subprocess.run(
        [*map(str, command), *filter(None, [variant])],
        cwd=SOURCES.parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return request.param, out


def test_a_checkpoint_of_another_library_means_what_it_says(
    made: tuple[str, Path], tmp_path: Path
) -> None:
    name, folder = made
    library = load_file(folder / "library.safetensors")
    spec, checkpoint, entries = read_model(folder)
    assert spec.scheme and len(entries) == len(checkpoint.tensors)
    places = {(entry.file, entry.offset) for entry in entries.values()}
    assert len(places) == len(entries)

    _check_weights(library, spec, entries)
    inputs, noise = FORMATS[name]
    assert {rule.inputs for rule in spec.scheme.rules} == {inputs}
    _check_products(library, spec, entries, inputs)
    _check_logits(library, spec, entries, noise)

    art = moec.export(folder, out=tmp_path / "art")
    assert art.manifest.weights.mode == "in-place" and not art.manifest.rewritten


@pytest.mark.slow  # CI proves the same schemes on small models: test_separate_experts, test_dense
def test_its_artefact_is_proven(made: tuple[str, Path], tmp_path: Path) -> None:
    art = moec.export(made[1], out=tmp_path / "art")
    assert_passed(moec.validate(art.path, tokens=200))


def _check_weights(
    library: dict[str, Tensor], spec: ModelSpec, entries: dict[str, TensorEntry]
) -> None:
    """Dequantised weights are the library's, to the last bit."""
    ours = {key: name for name, key in keys(spec).items()}
    shown = {k.removeprefix("dequantized."): v for k, v in library.items() if "dequantized." in k}
    assert len(shown) > 3
    for key, expected in shown.items():
        name = ours[key]
        codes, scale = view(entries[name]), view(entries[scale_of(name)])
        if codes.dim() == 3:
            each = [expert_weight([codes], [scale], e, len(codes), 128) for e in range(len(codes))]
            assert torch.equal(torch.stack(each), expected), key
        else:
            assert torch.equal(dequantize.eager(codes, scale, 0, 128, "fp32"), expected), key


def _check_products(
    library: dict[str, Tensor], spec: ModelSpec, entries: dict[str, TensorEntry], inputs: str
) -> None:
    """One module at a time, with inputs rounded: what the library makes of random numbers."""
    assert spec.scheme
    bound = spec.scheme.bound
    ours = {key: name for name, key in keys(spec).items()}
    static = inputs == "tensor"

    def of(name: str) -> Tensor:
        return view(entries[name])

    probes = [key.removesuffix(".input") for key in library if key.endswith(".input")]
    assert len(probes) > 3
    for probe in probes:
        x, expected = library[f"{probe}.input"], library[f"{probe}.output"]
        module = probe.removeprefix("probe.")
        if module.endswith(".experts"):
            fused = [ours[f"{module}.{part}_proj"] for part in ("gate_up", "down")]
            weights = [[each] for w in fused for each in (of(w), of(scale_of(w)))]
            scales = [of(input_scale_of(w)) if static else None for w in fused]
            count = spec.text.experts.count
            which = torch.arange(count).repeat_interleave(len(x) // count)[:, None]
            found = fp8_moe.eager(
                x, torch.ones(len(x), 1), which, "input", *weights, *scales, inputs, 128, bound
            )
        else:
            name = ours[f"{module}.weight"]
            weight = dequantize.eager(of(name), of(scale_of(name)), 0, 128, "fp32")
            scale = of(input_scale_of(name)) if static else None
            found = rounded(x, scale, inputs, 128, bound) @ weight.t()
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max(), probe


def _check_logits(
    library: dict[str, Tensor], spec: ModelSpec, entries: dict[str, TensorEntry], noise: float
) -> None:
    """The whole model. Rounding amplifies float32 noise to that of FP8: docs/numerics.md."""
    assert spec.scheme
    rules = tuple(rule.model_copy(update={"inputs": "none"}) for rule in spec.scheme.rules)
    wide_inputs = spec.scheme.model_copy(update={"rules": rules, "cache": False})
    narrow_cache = "logits_kv" if "logits_kv" in library else "logits"
    for scheme, expected, limit in (
        (wide_inputs, library["logits_weights"], 1e-5),
        (spec.scheme, library[narrow_cache], noise),
    ):
        session = eager_session(spec.model_copy(update={"scheme": scheme}), entries, "fp32")
        found = session.logits(library["input_ids"])
        assert (found - expected).norm() <= limit * expected.norm()
