"""Run the graph of target `ort-cuda` in ONNX's reference interpreter, in float32, on a CPU.

Nodes of our own domain have the eager meaning of their op. This proves the graph, and not the
library that runs it on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnx.reference.op_run import OpRun

from moec.artefact.artefact import Artefact
from moec.exporters.onnx.ort_cuda import FUSED_OPS, MOEC, whole
from moec.graph_builder import ops
from moec.runtime.engines.engine import Engine, Limits, Run
from moec.runtime.engines.interpreter import (
    array_of,
    interpreted,
    refuse_gpus,
    tensor_of,
    unbound,
    widen,
)
from moec.runtime.engines.ort_cuda.engine import model_of
from moec.runtime.engines.torch_program import shown


def _operator(op: ops.Op) -> type[OpRun]:
    """The operator that is a fused op; its numbers are one attribute."""

    def run(self: OpRun, *operands: Any, constants: str) -> tuple[Any, ...]:
        tensors = [None if each is None else tensor_of(each) for each in operands]
        results = op.eager(*whole(op, tensors, constants))
        found = results if isinstance(results, tuple) else (results,)
        caches = tensors[4:6] if op is ops.attention_fp8 else ()
        return tuple(array_of(each) for each in (*found, *caches) if each is not None)

    return type(op.name, (OpRun,), {"op_domain": MOEC, "_run": run})


_OPERATORS = [_operator(each) for each in (*FUSED_OPS, ops.attention_fp8)]


def _open(
    artefact: Artefact,
    part: str,
    device: str,
    options: str,
    taps: Sequence[str],
    given: Sequence[str] = (),
) -> Run:
    model = model_of(artefact, part, taps, given)
    weights = unbound(model, artefact)
    widen(model)
    dim = artefact.manifest.spec.text.dim
    return interpreted(ir.to_proto(model), weights, dim, _OPERATORS)


def _limits(artefact: Artefact, device: str) -> Limits:
    return Limits("buffers")


def _note(artefact: Artefact) -> str:
    return (
        "The library was not run: what ran is the graph, widened to float32. "
        "With --device cuda the proof runs the library."
    )


ENGINE = Engine(
    "interpreter",
    "ONNX's interpreter",
    _open,
    refuse_gpus,
    _limits,
    compute="fp32",
    note=_note,
    shown=shown,
    gives=_open,
)
