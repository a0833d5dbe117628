"""Run the ONNX model of an artefact in ONNX's reference interpreter, in float32.

This proves graphs whose own engine cannot run on this machine. ONNX operators have their ONNX
meaning, and all others the meaning of the op that they were lowered from. Half precision becomes
float32, so that a proof compares the graph and not the rounding of an engine. FP8 stays FP8.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.exporters.onnx.external_data import entry_of
from moec.exporters.onnx.lowering import type_of
from moec.exporters.onnx.strangers import load_checked
from moec.exporters.onnx.weight_inputs import weights_of
from moec.graph_builder import ops
from moec.runtime.engines.engine import Engine, Limits, Run, compiled_limits
from moec.runtime.engines.inner_values import open_values
from moec.spec import names
from moec.spec.errors import refuse
from moec.weights.view import view

_HALF = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_FLOAT = ir.DataType.FLOAT


def interpreter(
    artefact: Artefact,
    taps: Sequence[str] = (),
    part: str = "model",
    given: Sequence[str] = (),
) -> Run:
    """Open a part of `artefact`, "model" or "vision", to be run node by node.

    `taps` names values that the engine returns in addition to its outputs. Inputs "NAME.given"
    stand for the inner values `given`.

    Raises:
        MoecError: the artefact has no weights, or they have changed; or the ONNX model is damaged
            (exit code 1).
    """
    model = load_checked(artefact, part)
    weights = unbound(model, artefact)
    show_routers(model.graph)
    widen(model)
    proto = ir.to_proto(model)
    open_values(proto, taps, given)
    return interpreted(proto, weights, artefact.manifest.spec.text.dim, [Attention, MoecMoe])


def interpreted(
    proto: onnx.ModelProto, weights: Mapping[str, Any], dim: int, operators: list[type[OpRun]]
) -> Run:
    """Run `proto` node by node, with these `weights` and `operators` beside ONNX's own.

    A call writes into the caches that it is given. Images have features of the width `dim`.
    """
    evaluator = ReferenceEvaluator(proto, new_ops=operators)
    taken = [each.name for each in proto.graph.input if each.name not in weights]
    outputs = [each.name for each in proto.graph.output]
    no_images = {names.IMAGE_FEATURES: torch.zeros(0, dim)}

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fed = no_images | dict(feeds)
        values = {name: array_of(fed[name]) for name in taken}
        results = map(tensor_of, evaluator.run(None, {**weights, **values}))
        found = dict(zip(outputs, results, strict=True))
        for name in filter(names.is_present, outputs):
            feeds[names.past_of(name)].copy_(found.pop(name))  # as engines do
        return found

    return run


def show_routers(graph: ir.Graph) -> None:
    """Add nodes for the router's logits and choice, which the MoE plugin does not return."""
    for node in [node for node in graph if node.op_type == "MoecMoe"]:
        experts = node.inputs[2]
        index = names.layer_of(str(experts.name)) if experts else None
        assert index is not None, node
        logits = ir.Node("", "Gemm", node.inputs[:2], [ir.AttrInt64("transB", 1)])
        chosen = ir.Node("", "ArgMax", logits.outputs, [ir.AttrInt64("axis", 1)])
        for each, name, dtype in (
            (logits, names.router(index), _FLOAT),
            (chosen, names.chosen(index), ir.DataType.INT64),
        ):
            each.outputs[0].name, each.outputs[0].type = name, ir.TensorType(dtype)
            graph.append(each)


def unbound(model: ir.Model, artefact: Artefact) -> dict[str, Any]:
    """Turn the weights of `model` into inputs; return their values, half precision as float32."""
    graph, stored = model.graph, artefact.stored()
    for each in list(graph.initializers.values()):
        if entry_of(str(each.name), stored):
            graph.initializers.pop(str(each.name))
            each.const_value = None
            graph.inputs.append(each)
    shapes = {str(each.name): type_of(each).shape for each in graph.inputs}
    return {
        name: array_of(torch.cat([view(part).flatten() for part in parts]).reshape(shapes[name]))
        for name, parts in weights_of(artefact.manifest, stored, list(shapes)).items()
    }


def widen(model: ir.Model) -> None:
    """Turn half precision into float32 in the whole model."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in graph:
            to = node.attributes.get("to")
            if to is not None and to.as_int() in [each.value for each in _HALF]:
                node.attributes["to"] = ir.AttrInt64("to", _FLOAT.value)
            for each in node.outputs:
                _widen(each)
        for each in graph.inputs:
            _widen(each)


def _widen(each: ir.Value) -> None:
    if each.dtype in _HALF:
        each.type = ir.TensorType(_FLOAT)


class Attention(OpRun):
    """The operator trt::Attention: ONNX's Attention with further attributes of TensorRT."""

    op_domain = "trt"

    def _run(self, *operands: Any, scale: float, **more: int) -> tuple[Any]:
        q, k, v, *masks = map(tensor_of, operands)
        mask = masks[0] if masks else None
        size = q.shape[3] if q.dim() == 4 else q.shape[2] // more["q_num_heads"]
        q = q * (scale * size**0.5)  # the op itself scales by size**-0.5
        if q.dim() == 3:  # [B, S, heads * d]
            counts = more["q_num_heads"], more["kv_num_heads"]
            return (array_of(ops.attention.eager(q, k, v, mask, *counts, None)),)
        flat = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]  # [B, heads, S, d] ->
        mixed = ops.attention.eager(*flat, mask, q.shape[1], k.shape[1], None)
        return (array_of(mixed.unflatten(2, (q.shape[1], -1)).transpose(1, 2)),)


class MoecMoe(OpRun):
    """The operator moec::MoecMoe of the MoE plugin, which computes the op `moe_layer`."""

    op_domain = "moec"

    def _run(self, *operands: Any, **names: str) -> tuple[Any]:
        return (array_of(ops.moe_layer.eager(*map(tensor_of, operands))),)


def array_of(x: Tensor) -> Any:
    """`x` as an array for ONNX's interpreter."""
    if x.dtype == ops.FP8:
        return x.contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()


def tensor_of(x: Any) -> Tensor:
    """An array of ONNX's interpreter as a tensor."""
    x = np.ascontiguousarray(x)
    if x.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(x.view(np.uint8)).view(ops.FP8)
    return torch.from_numpy(x)


def _open(
    artefact: Artefact,
    part: str,
    device: str,
    options: str,
    taps: Sequence[str],
    given: Sequence[str] = (),
) -> Run:
    return interpreter(artefact, taps, part, given)


def _shown(artefact: Artefact, part: str, wanted: Sequence[str]) -> list[str]:
    """Those of the names `wanted` that the interpreter can show."""
    model = load_checked(artefact, part)
    show_routers(model.graph)
    known = {each.name for node in model.graph for each in node.outputs}
    return [name for name in wanted if name in known]


def refuse_gpus(artefact: Artefact, device: str) -> None:
    """Refuse all devices but the CPU."""
    if device == "cuda":
        refuse(
            f"{artefact.path} on {device}",
            "an interpreter of ONNX",
            "device cpu, where a graph is proven whose engine shows no inner values",
            "leave --device out",
            exit_code=3,
        )
    if device != "cpu":
        refuse(f"device {device}", "no such device", "cpu or cuda", "choose one of them")


def _limits(artefact: Artefact, device: str) -> Limits:
    return compiled_limits(artefact, batch=False)


def _note(artefact: Artefact) -> str:
    engines = "was built, and not run" if artefact.manifest.engines else "is not built yet"
    return f"The engine {engines}: what ran is its ONNX, widened to float32."


ENGINE = Engine(
    "interpreter",
    "ONNX's interpreter",
    _open,
    refuse_gpus,
    _limits,
    compute="fp32",
    note=_note,
    shown=_shown,
    gives=_open,
)
