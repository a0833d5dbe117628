"""The graph of a small decoder as text, and what each pass changes in it.

`golden/decoder.txt` and `golden/vision.txt` are whole graphs; the other files hold the lines that a
pass takes away (-) and adds (+). Where a change of the code means to change a graph:

    python -m tests.graph_builder.test_golden_graphs    writes them anew; read the difference
"""

import difflib
from collections.abc import Iterator
from functools import partial
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from torch import fx

from moec.exporters.precision import in_precision
from moec.graph_builder.decoder import build_decoder
from moec.graph_builder.passes.buffers import keep_buffers
from moec.graph_builder.passes.fused.fuse import fuse
from moec.graph_builder.passes.fused.neighbours import join_neighbours
from moec.graph_builder.passes.fused.quantisation import join_encodes
from moec.graph_builder.passes.genai import genai_inputs
from moec.graph_builder.passes.quantize import quantize
from moec.graph_builder.passes.skip_norm import join_skip_norms
from moec.graph_builder.passes.static import make_static
from moec.graph_builder.types import TensorType
from moec.graph_builder.vision import build_vision
from tests.small import SMALL

GOLDEN = Path(__file__).parent / "golden"
TEXT = SMALL.model_copy(update={"vision": None})


def texts() -> Iterator[tuple[str, str]]:
    """Every golden file by name."""
    decoder = build_decoder(TEXT)
    yield "decoder", "\n".join(lines(decoder))
    fp8 = in_precision(TEXT, "fp8", "modelopt", "fp8")
    yield change("quantize", decoder, partial(quantize, spec=fp8))
    fused = build_decoder(TEXT)
    dynamic = in_precision(TEXT, "fp8", "dynamic", None)
    for name, each in {
        "keep_buffers": keep_buffers,
        "join_skip_norms": join_skip_norms,
        "fuse": partial(fuse, spec=dynamic),
        "join_encodes": join_encodes,
        "join_neighbours": join_neighbours,
    }.items():
        yield change(name, fused, each)
    sizes = {"ring_slots": 8, "global_slots": 32}
    yield change(
        "make_static", keep_buffers(build_decoder(TEXT)), partial(make_static, sizes=sizes)
    )
    yield change("genai_inputs", keep_buffers(build_decoder(TEXT)), genai_inputs)
    yield "vision", "\n".join(lines(build_vision(SMALL)))


def change(name: str, graph: fx.GraphModule, each: Any) -> tuple[str, str]:
    """The lines that a pass takes away and adds; `graph` is what it leaves."""
    before = lines(graph)
    each(graph)
    found = difflib.unified_diff(before, lines(graph), n=0, lineterm="")
    return name, "\n".join(line for line in list(found)[2:] if not line.startswith("@@"))


def lines(graph: fx.GraphModule) -> list[str]:
    """A line for each node but weights: results, op, operands, type, role."""
    found = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            found.append(f"input {_name(node)}: {_type(node)}")
        elif node.op == "output":
            found.append(f"output {', '.join(node.meta['outputs'])}")
        elif node.op == "call_function" and node.target is not getitem:
            each = _results(node)
            operands = ", ".join(map(_operand, node.args))
            results = ", ".join(_name(result) if result else "_" for result in each)
            types = " ".join(_type(result) for result in each if result)
            roles = ", ".join(str(r.meta["role"]) for r in each if r and "role" in r.meta)
            line = f"{results} = {node.target.__name__.split('.')[0]}({operands}): {types}"
            found.append(f"{line}  # {roles}" if roles else line)
    return found


def _results(node: fx.Node) -> list[fx.Node | None]:
    """The nodes of an op's results; None for those that nobody uses."""
    if isinstance(node.meta["type"], TensorType):
        return [node]
    users = {user.args[1]: user for user in node.users}
    return [users.get(i) for i in range(len(node.meta["type"]))]


def _operand(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_operand, value))}]"
    return _name(value) if isinstance(value, fx.Node) else str(value)


def _name(node: fx.Node) -> str:
    return str(node.meta["name"])


def _type(node: fx.Node) -> str:
    of = node.meta["type"]
    dtype = str(of.dtype).removeprefix("torch.")
    return f"{dtype} [{', '.join(map(str, of.shape))}]"


@pytest.mark.parametrize(("name", "text"), texts())
def test_graphs_are_as_they_were(name: str, text: str) -> None:
    assert text == (GOLDEN / f"{name}.txt").read_text().rstrip("\n")


def test_no_golden_text_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {name for name, _ in texts()}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, text in texts():
        (GOLDEN / f"{name}.txt").write_text(text + "\n")
