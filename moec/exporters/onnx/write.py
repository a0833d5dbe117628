"""Graph -> an ONNX file: lower, tidy, check, bind, save."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from torch import fx

from moec.exporters.manifest import Port
from moec.exporters.onnx.binding import bind
from moec.exporters.onnx.lowering import lower
from moec.exporters.onnx.standard import OPSET, STANDARD
from moec.weights.shard import TensorEntry

#: dialect -> (rule table, opset)
DIALECTS = {"standard": (STANDARD, OPSET)}


def lower_model(graph: fx.GraphModule, dialect: str, name: str) -> ir.Model:
    """`graph` in `dialect`, weights unbound. Shape arithmetic that layers repeat is shared."""
    rules, opset = DIALECTS[dialect]
    model = lower(graph, rules, opset, name)
    CommonSubexpressionEliminationPass()(model)
    return model


def save_checked(model: ir.Model, path: Path) -> None:
    """Write the unbound `model` to `path`; run ONNX's checker, shape inference included."""
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)


def save_bound(model: ir.Model, path: Path, entries: Mapping[str, TensorEntry], root: Path) -> None:
    """Bind `model` to `entries` below `root` and write it; no weight bytes are written."""
    bind(model, entries, root)
    ir.save(model, path)


def ports(values: Sequence[ir.Value]) -> tuple[Port, ...]:
    """The manifest's view of graph inputs or outputs."""
    return tuple(
        Port(
            name=each.name or "",
            dtype=each.dtype.name.lower() if each.dtype else "",
            shape=tuple(
                str(dim.value) if isinstance(dim, ir.SymbolicDim) else dim
                for dim in each.shape or ()
            ),
        )
        for each in values
    )
