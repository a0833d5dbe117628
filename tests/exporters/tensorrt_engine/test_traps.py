"""What TensorRT does silently, or says badly, is one clear refusal here. With the real parser.

TensorRT runs in this process, because a child for each model would take most of the time.
`test_child.py` and `test_build.py` start children.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h

from moec.artefact.engine_job import Built, Job, Span
from moec.exporters.tensorrt.process import child
from tests.exporters.tensorrt_engine.models import SHAPES, attention, job, model, spans, value
from tests.refusals import refused_and_nothing_left

pytest.importorskip("tensorrt_rtx")


def build_engine(wanted: Job) -> Built:
    """What the child process does."""
    return child.build(wanted, io.BytesIO(), lambda kind, what: None)


def refused(folder: Path, made: onnx.ModelProto, names: str, code: int = 1, **changes: Any) -> None:
    """Building `made` is refused, naming `names`; no engine is left."""
    wanted = job(made, folder, **changes)
    refused_and_nothing_left(folder, lambda: build_engine(wanted), names, code)


def test_causal_attention_would_start_at_the_first_slot(tmp_path: Path) -> None:
    made = attention(("q", "k", "v"), is_causal=1)
    refused(tmp_path, made, "causal UPPER_LEFT")
    refused(tmp_path, made, "causal UPPER_LEFT", masked=False)


def test_a_missing_mask_is_noticed(tmp_path: Path) -> None:
    refused(tmp_path, attention(("q", "k", "v")), "mask False")
    build_engine(job(attention(("q", "k", "v")), tmp_path, masked=False))
    refused(tmp_path, attention(), "mask True", masked=False)


def _lengths_also_in(made: onnx.ModelProto) -> onnx.ModelProto:
    """`made`, whose lengths n something else reads too, so that they are not unused."""
    made.graph.node.append(h.make_node("Identity", ["n"], ["n_too"]))
    made.graph.output.append(value("n_too", T.INT64, SHAPES["n"]))
    return made


@pytest.mark.parametrize("change", [lambda made: made, _lengths_also_in])
@pytest.mark.parametrize(
    ("op", "reads", "index"),
    [
        ("Attention", ("q", "k", "v", "m", "", "", "n"), 6),  # nonpad_kv_seqlen, dropped
        ("TRT_Attention", ("q", "k", "v", "m", "", "n"), 5),  # where RTX 1.7 reads it
        ("TRT_Attention", ("q", "k", "v", "m", "", "", "n"), 6),  # where the documents have it
        ("TRT_Attention", ("q", "k", "v", "m", "", "", "", "n"), 7),
    ],
)
def test_lengths_may_be_ignored(
    op: str, reads: tuple[str, ...], index: int, change: Callable[..., Any], tmp_path: Path
) -> None:
    refused(tmp_path, change(attention(reads, op=op)), f"input {index}, n")


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("TRT_Attention", {"is_causal": 1}),
        ("TRT_Attention", {"scale": 0.5}),
        ("TRT_Attention", {"decomposable": 1}),
        ("Attention", {"causal_kind": "lower_right"}),
        ("Attention", {"nonexistent_attr": 0.0}),
        ("RotaryEmbedding", {"interleave": 1}),
    ],
)
def test_unknown_attributes_would_be_ignored(
    op: str, attributes: dict[str, Any], tmp_path: Path
) -> None:
    made = attention(op=op, domain="trt", **attributes)
    refused(tmp_path, made, f"attribute {next(iter(attributes))}")


def test_attributes_of_plugins_are_the_plugins_own(tmp_path: Path) -> None:
    made = attention(op="Unheard", domain="trt", weight_bits=4)
    refused(tmp_path, made, "Plugin not found", attentions=0)


def test_an_operator_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path, attention(op="Unheard"), "node att (Unheard)", attentions=0)


def test_the_parser_is_quoted_without_its_noise(tmp_path: Path) -> None:
    made = attention(op="RotaryEmbedding", reads=("q", "k", "v"))
    refused(tmp_path, made, "cosCacheDims.nbDims == 2.)\n  expected:", attentions=0)
    refused(tmp_path, attention(is_causal=1), "mask cannot be used together with CausalMaskKind")
    refused(tmp_path, attention(softcap=1.0), "Setting softcap is not supported")


def test_attention_in_float32_has_no_kernel(tmp_path: Path) -> None:
    refused(tmp_path, attention(dtype=T.FLOAT), "mark the attention TRT_decomposable")
    made = attention(dtype=T.FLOAT, domain="trt", TRT_decomposable=1)
    refused(tmp_path, made, "decomposable True")
    assert build_engine(job(made, tmp_path, decomposable=True)).precisions["FLOAT"] > 10
    refused(tmp_path, attention(), "decomposable False", decomposable=True)


def test_attentions_are_counted(tmp_path: Path) -> None:
    refused(tmp_path, attention(), "1 attention layers", attentions=2)
    refused(tmp_path, _passing(), "0 attention layers", attentions=1)


def test_fp8_weights_cannot_be_gathered(tmp_path: Path) -> None:
    nodes = [
        h.make_node("Gather", ["W", "i"], ["picked"], name="pick"),
        h.make_node("DequantizeLinear", ["picked", "s"], ["y"]),
    ]
    weights = [
        h.make_tensor("W", T.FLOAT8E4M3FN, [8, 16], bytes(128), raw=True),
        h.make_tensor("s", T.FLOAT, [], [1.0]),
    ]
    made = model(nodes, [value("i", T.INT64, [2])], [value("y", T.FLOAT, [2, 16])], weights)
    refused(tmp_path, made, "W_output has datatype FP8 but is not consumed by")


def _cast_and_add(weight: onnx.TensorProto | None, kind: int, constant: bool = False) -> Any:
    nodes = [
        h.make_node("Cast", ["w"], ["c"], to=T.FLOAT),
        h.make_node("Add", ["x", "c"], ["y"]),
    ]
    inputs = [value("x", T.FLOAT, [4])]
    if constant:
        nodes.insert(0, h.make_node("Constant", [], ["w"], name="w", value=weight))
    elif not weight:
        inputs.append(value("w", kind, [4]))
    initializers = [weight] if weight and not constant else []
    return model(nodes, inputs, [value("y", T.FLOAT, [4])], initializers)


@pytest.mark.parametrize("where", ["weight", "input", "constant"])
@pytest.mark.parametrize("kind", [T.UINT8, T.DOUBLE])
def test_some_dtypes_would_become_others(kind: int, where: str, tmp_path: Path) -> None:
    weight = None if where == "input" else h.make_tensor("w", kind, [4], [1, 2, 3, 4])
    made = _cast_and_add(weight, kind, constant=where == "constant")
    name = T.DataType.Name(kind).lower()
    refused(tmp_path, made, f"{name}, which TensorRT lacks or widens", code=2)


def test_an_output_would_become_float32(tmp_path: Path) -> None:
    cast = h.make_node("Cast", ["x"], ["y"], to=T.DOUBLE)
    made = model([cast], [value("x", T.FLOAT, [4])], [value("y", T.DOUBLE, [4])])
    refused(tmp_path, made, "double, as in the graph")


def test_two_weights_of_one_name(tmp_path: Path) -> None:
    weight = h.make_tensor("w", T.FLOAT, [4], [1, 2, 3, 4])
    made = _cast_and_add(weight, T.FLOAT)
    made.graph.initializer.append(weight)
    refused(tmp_path, made, "duplicate tensor name: w")


def test_ports_are_those_of_the_graph(tmp_path: Path) -> None:
    wanted = job(attention(), tmp_path)
    fewer = {name: dtype for name, dtype in wanted.inputs.items() if name != "m"}
    refused(tmp_path, attention(), "input m", inputs=fewer)
    refused(tmp_path, attention(), "output z", outputs=wanted.outputs | {"z": "float"})
    refused(tmp_path, attention(), "BF16", inputs=wanted.inputs | {"q": "float16"})


def _passing(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    inputs = [value("x", T.FLOAT, [4]), value("z", T.FLOAT, [4])]
    copy = h.make_node("Identity", ["x"], ["y"])
    return model([copy, *nodes], inputs, [value("y", T.FLOAT, [4])])


def test_inputs_that_nothing_reads(tmp_path: Path) -> None:
    refused(tmp_path, _passing(), "input z")
    dead = h.make_node("Add", ["z", "x"], ["dead"])  # of which TensorRT says nothing clear
    refused(tmp_path, _passing(dead), "input z")


def test_an_input_may_give_its_shape_alone_or_decide_a_branch(tmp_path: Path) -> None:
    shape = h.make_node("Shape", ["z"], ["s"])
    expand = h.make_node("Expand", ["x", "s"], ["y"])
    inputs = [value("x", T.FLOAT, [1]), value("z", T.FLOAT, ["n"])]
    build_engine(job(model([shape, expand], inputs, [value("y", T.FLOAT, ["n"])]), tmp_path))
    branches = {
        f"{name}_branch": h.make_graph(
            [h.make_node(op, ["x"], [name])], name, [], [value(name, T.FLOAT, [4])]
        )
        for name, op in (("then", "Neg"), ("else", "Abs"))
    }
    choice = h.make_node("If", ["c"], ["y"], **branches)
    inputs = [value("x", T.FLOAT, [4]), value("c", T.BOOL, [])]
    build_engine(job(model([choice], inputs, [value("y", T.FLOAT, [4])]), tmp_path))


def test_numbers_that_decide_about_shapes(tmp_path: Path) -> None:
    expand = h.make_node("Expand", ["x", "s"], ["y"])
    inputs = [value("x", T.FLOAT, [1]), value("s", T.INT64, [1])]
    made = model([expand], inputs, [value("y", T.FLOAT, ["n"])])
    refused(tmp_path, made, "input s", code=2)


def test_profiles_must_fit_the_inputs(tmp_path: Path) -> None:
    good = spans(attention())
    q = good["q"]
    fixed = Span(min=(1, 8, 1, 64), opt=(1, 8, 4, 64), max=(4, 8, 8, 64))
    wrong: list[tuple[tuple[dict[str, Span], ...], str]] = [
        ((), "no profile"),
        (({name: span for name, span in good.items() if name != "m"},), "input m, profile 0"),
        ((good, good | {"q": fixed}), "input q, profile 1"),
        ((good | {"q": Span(min=q.max, opt=q.opt, max=q.max)},), "input q, profile 0"),
        ((good | {"q": Span(min=(1, 8), opt=(1, 8), max=(1, 8))},), "input q, profile 0"),
        ((good | {"typo": q},), "no such input"),
    ]
    for profiles, names in wrong:
        refused(tmp_path, attention(), names, code=2, profiles=profiles)


def test_architectures_that_have_no_such_dtype(tmp_path: Path) -> None:
    refused(tmp_path, attention(), "bf16: SM80", code=2, architectures=("SM75", "SM89"))
