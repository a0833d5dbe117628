"""An ONNX file from a stranger reads nothing but the weights that the manifest names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import moec
from moec.artefact.artefact import open_artefact
from moec.exporters.onnx.lowering import FUNCTIONS
from moec.exporters.onnx.strangers import (
    EACH_EXPERT,
    check_model,
    graphs_inside,
    most_nodes,
    read_checked,
)
from moec.exporters.onnx.write import graphs_of, lower_model
from moec.spec.hf.quantization import read_scheme
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from tests.conftest import SPEC
from tests.damage import FIRST, SECOND, listed_again
from tests.refusals import refusal

Change = Callable[[Any], object]
EMBED = "embed.weight"


def change_model(artefact: Path, change: Change, part: str = "model") -> None:
    """Change an ONNX file, and let the manifest agree, as a stranger's tool does."""
    file = artefact / f"{part}.onnx"
    model = onnx.load(file, load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())
    listed_again(artefact, file.name)


def _weight(model: Any) -> Any:
    return next(each for each in model.graph.initializer if each.name == EMBED)


def _place(key: str, value: str) -> Change:
    def change(model: Any) -> None:
        for entry in _weight(model).external_data:
            if entry.key == key:
                entry.value = value

    return change


def _external(name: str = "stolen", location: str = "/etc/passwd") -> Any:
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.UINT8, dims=[16])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _branch(model: Any) -> None:
    """A subgraph with external data of its own, under the name of a weight."""
    graph = onnx.GraphProto(name="branch")
    stolen = graph.initializer.add()
    stolen.CopyFrom(_weight(model))
    graph.output.append(helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1]))
    model.graph.node.append(
        helper.make_node("If", ["c"], ["o"], then_branch=graph, else_branch=graph)
    )


def _function(domain: str, *nodes: onnx.NodeProto) -> Callable[[Any], None]:
    def add(model: Any) -> None:
        opsets = [helper.make_opsetid(name, 1) for name in ("", FUNCTIONS)]
        made = helper.make_function(domain, "Evil", ["x"], ["y"], list(nodes), opsets)
        model.functions.append(made)

    return add


def _many_calls(model: Any) -> None:
    _function(FUNCTIONS, *[_PLAIN] * EACH_EXPERT)(model)
    model.graph.node.extend([_ITSELF] * (most_nodes(SPEC) // EACH_EXPERT + 1))


_ITSELF = helper.make_node("Evil", ["x"], ["y"], domain=FUNCTIONS)
_PYTHON = helper.make_node("PyOp", ["x"], ["y"], domain="ai.pyop")
_PLAIN = helper.make_node("Relu", ["x"], ["y"])


def _sparse(model: Any) -> None:
    values = numpy_helper.from_array(__import__("numpy").zeros(1, "float32"), "values")
    model.graph.sparse_initializer.add().values.CopyFrom(values)


def _twice(model: Any) -> None:
    """The first location is another file, the last one is right."""
    weight = _weight(model)
    right = {entry.key: entry.value for entry in weight.external_data}
    weight.external_data[0].key, weight.external_data[0].value = "location", "/etc/passwd"
    for key, value in right.items():
        weight.external_data.add(key=key, value=value)


CASES: dict[str, tuple[Change, str]] = {
    "another file": (_place("location", "/etc/passwd"), EMBED),
    "a file above": (_place("location", f"../{FIRST}"), EMBED),
    "a pipe or device": (_place("location", "/dev/stdin"), EMBED),
    "another spelling": (_place("location", f"./{FIRST}"), EMBED),
    "another shard": (_place("location", SECOND), EMBED),
    "another place": (_place("offset", "8"), EMBED),
    "no number": (_place("offset", "0x10"), EMBED),
    "another length": (_place("length", "16"), EMBED),
    "a further key": (lambda m: _weight(m).external_data.add(key="checksum", value="x"), EMBED),
    "a key twice": (_twice, EMBED),
    "another type": (lambda m: setattr(_weight(m), "data_type", 10), EMBED),
    "another shape": (lambda m: _weight(m).dims.append(1), EMBED),
    "a weight that the manifest lacks": (
        lambda m: m.graph.initializer.append(_external()),
        "stolen",
    ),
    "data in an attribute": (
        lambda m: m.graph.node.append(helper.make_node("Constant", [], ["x"], value=_external())),
        "value",
    ),
    "a subgraph": (_branch, EMBED),
    "a function of another domain": (_function("evil", _PLAIN), "function evil::Evil"),
    "a function that calls itself": (_function(FUNCTIONS, _ITSELF), "moec.functions::Evil"),
    "an operator in a function": (_function(FUNCTIONS, _PYTHON), "ai.pyop::PyOp"),
    "functions that make too many nodes": (_many_calls, f"at most {most_nodes(SPEC):,}"),
    "sparse data": (_sparse, "sparse"),
    "a domain": (lambda m: m.opset_import.add(domain="evil", version=1), "domain evil"),
    "an operator of a further domain": (
        lambda m: m.graph.node.append(helper.make_node("PyOp", ["x"], ["y"], domain="ai.pyop")),
        "ai.pyop::PyOp",
    ),
    "an operator of ONNX Runtime": (
        lambda m: m.graph.node.append(
            helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")
        ),
        "com.microsoft::EPContext",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_moec_never_writes_is_refused(artefact: Path, case: str) -> None:
    change, names = CASES[case]
    change_model(artefact, change)
    refusal(lambda: moec.open_session(artefact), names)


def test_it_is_refused_before_onnx_runtime_sees_it(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_model(artefact, _place("location", "/etc/passwd"))
    monkeypatch.setattr("onnxruntime.InferenceSession", None)
    refusal(lambda: moec.open_session(artefact), EMBED)


def test_the_vision_tower_is_checked_too(artefact: Path) -> None:
    change_model(artefact, lambda m: m.graph.initializer.append(_external()), "vision")
    refusal(lambda: read_checked(open_artefact(artefact), "vision"), "stolen")


def test_bind_checks_the_graph_that_it_binds(artefact: Path, checkpoint: Path) -> None:
    change_model(artefact, lambda m: m.graph.initializer.append(_external()))
    refusal(lambda: moec.bind(artefact, checkpoint), "stolen")


def test_an_artefact_without_weights_has_no_external_data(checkpoint: Path, tmp_path: Path) -> None:
    art = moec.export(moec.load_spec(checkpoint), out=tmp_path / "unbound").path
    change_model(art, lambda m: m.graph.initializer.append(_external()))
    refusal(lambda: moec.bind(art, checkpoint), "stolen")


def test_an_expert_is_a_slice_of_its_tensor(checkpoint: Path, tmp_path: Path) -> None:
    """Target ort writes an initializer for each expert of a stacked weight."""
    art = moec.export(checkpoint, target="ort", precision="fp32", weights="copy",
                      out=tmp_path / "ort").path  # fmt: skip
    read_checked(open_artefact(art), "model")

    def swap(model: Any) -> None:
        experts = [each for each in model.graph.initializer if each.name.endswith("[1]")]
        for entry in experts[0].external_data:
            if entry.key == "offset":
                entry.value = str(int(entry.value) + 2)

    change_model(art, swap)
    refusal(lambda: moec.open_session(art), "[1]")


@pytest.mark.parametrize("dialect", ["standard", "ort"])
def test_our_own_functions_are_far_from_too_many_nodes(dialect: str) -> None:
    """FP8 in blocks with experts one by one, as DeepSeek-V3 has it, takes the most."""
    spec = reduced(PRESETS["deepseek-v3"], 5)
    assert spec.text.experts is not None
    few = spec.text.experts.model_copy(update={"count": 16})
    spec = spec.model_copy(update={"text": spec.text.model_copy(update={"experts": few})})
    scheme = read_scheme(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]},
        Path("config.json"),
        spec,
    )
    spec = spec.model_copy(update={"scheme": scheme})
    graph = graphs_of(spec, "bf16", dialect)["model"]
    model = ir.to_proto(lower_model(graph, dialect, "model").model)
    check_model(Path("model.onnx"), model, {}, most_nodes(spec))
    nodes = sum(len(graph.node) for each in model.functions for _, graph in graphs_inside(each))
    assert model.functions and EACH_EXPERT * 0.5 < nodes / 16 < EACH_EXPERT * 0.7
