"""A proof finds faults that somebody else planted in the files, and names their layer and op.

benchmarks/planted_faults.py plants all of the faults in tests/planted/table.py; here are twelve,
one of a kind, in a model of four layers and six experts.
"""

from functools import cache
from pathlib import Path

import pytest

import moec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.planted.change import change, outputs
from tests.planted.fault import Fault, right_layer, right_op, split
from tests.planted.plant import planted
from tests.planted.table import GRAPH, WEIGHTS

pytestmark = pytest.mark.full

#: the faults by target: name, and the layer of four in which it is planted; layer 3 sees everything
CASES = (
    ("onnx", "norm epsilon 1e-6", 0),
    ("onnx", "RoPE halves", 1),
    ("onnx", "chunk border off by one", None),
    ("onnx", "lengths ignored in the ring", None),
    ("onnx", "softmax router", 2),
    ("onnx", "gate and up swapped, shared", 3),
    ("onnx", "bias of 1e-3 on a logit", None),
    ("ort", "temperature dropped", 3),
    ("ort", "key norm dropped", 0),
    ("ort", "experts 3 and 5 swapped", 2),
    ("ort", "attention residual dropped", 1),
    ("weights", "expert 4 zeroed", 2),
)
FAULTS = {target: {fault.name: fault for fault in faults}
          for target, faults in (GRAPH | {"weights": WEIGHTS}).items()}  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small artefact of four layers with its own weights, by target."""
    folder = tmp_path_factory.mktemp("clean")
    spec = reduced(PRESETS["tiny-scout"], 4)
    experts = spec.text.experts.model_copy(update={"count": 6})
    text = spec.text.model_copy(update={"experts": experts})
    spec = spec.model_copy(update={"vision": None, "text": text})
    write_random_checkpoint(spec, folder / "checkpoint")
    made = {
        target: moec.export(
            folder / "checkpoint", target, "fp32", folder / target, weights="copy"
        ).path
        for target in ("onnx", "ort")
    }
    return made | {"weights": made["onnx"]}


expected = cache(outputs)


@pytest.mark.parametrize("target, name, layer", CASES)
def test_a_planted_fault_is_found_and_named(
    target: str, name: str, layer: int | None, clean: dict[str, Path], tmp_path: Path
) -> None:
    fault = FAULTS[target][name].in_layer(layer)
    folder = planted(clean[target], fault, tmp_path / "planted")
    amount, _ = change(expected(clean[target]), outputs(folder))
    assert not amount < 1e-5, "the fault changes nothing"
    report = moec.validate(folder, seed=3)
    assert not report.passed
    named = report.first_divergence
    assert named and right_layer(fault, named), named
    assert right_op(fault, named), named


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_the_clean_artefact_passes(target: str, clean: dict[str, Path]) -> None:
    assert moec.validate(clean[target], seed=3).passed


@pytest.mark.parametrize(
    "name, found",
    [
        ("layers.3.attn.q.rope", (3, "attn.q.rope")),
        ("layer 3: attn.q.rope", (3, "attn.q.rope")),
        ("layers.3 router", (3, "router")),
        ("ring.mask", (None, "ring.mask")),
        ("vision.layers.1.attn.o", (1, "vision.attn.o")),
        ("present.0.key", (0, "present.key")),
        ("logits, chunk borders", (None, "logits.chunk.borders")),
    ],
)
def test_a_name_is_a_layer_and_an_op(name: str, found: tuple[int | None, str]) -> None:
    assert split(name) == found


def test_a_fault_accepts_the_values_of_its_table() -> None:
    fault = Fault("x", "x", lambda model, layer: None, 3, "attn.q.rope present.3.key")
    assert fault.accepted == {(3, "attn.q.rope"), (3, "present.key")}
    assert right_op(fault, "layer 3: attn.q.rope") and not right_op(fault, "layer 2: attn.q.rope")
    assert right_layer(fault, "layers.3 router") and not right_layer(fault, "logits")
