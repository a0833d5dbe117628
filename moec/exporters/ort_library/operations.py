"""The operations of a graph of fused ops: what the custom-op library must hold to run it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import fx

from moec.artefact.manifest import Manifest
from moec.exporters.onnx.ort_cuda import split
from moec.exporters.torch.program import part_graph
from moec.graph_builder import ops
from moec.kernels.ahead_of_time import operations
from moec.kernels.ahead_of_time.variants import Operation
from moec.kernels.sizes import Heads, Sizes
from moec.spec import names

Types = list[Any]
Numbers = Mapping[str, Any]


def _sizes(down: Any, router: Any) -> Sizes:
    _, dim, hidden = down.shape
    return Sizes(dim, hidden, router.shape[0])


def _attention(types: Types, numbers: Numbers) -> Operation:
    key = types[4]
    heads = Heads(numbers["heads"], numbers["kv_heads"], key.shape[3])
    return operations.attention_fp8(
        heads, types[1] is not None, types[3] is not None, numbers.get("eps")
    )


#: op -> its operation, from the types of its tensors and its numbers
_OF: dict[str, Callable[[Types, Numbers], Operation]] = {
    ops.norm_fp8.name: lambda t, n: operations.norm_fp8(t[0].shape[1], n["eps"]),
    ops.skip_norm_fp8.name: lambda t, n: operations.skip_norm_fp8(t[0].shape[1], n["eps"]),
    ops.skip_norm.name: lambda t, n: operations.skip_norm(t[0].shape[1], n["eps"]),
    ops.rms_norm.name: lambda t, n: operations.rms_norm(t[0].shape[1], n["eps"]),
    ops.encode.name: lambda t, n: operations.encode(t[0].shape[1]),
    ops.swiglu_fp8.name: lambda t, n: operations.swiglu_fp8(t[0].shape[1] // 2),
    ops.fp8_linear.name: lambda t, n: operations.fp8_linear(*t[2].shape),
    ops.moe_layer.name: lambda t, n: operations.moe_layer(_sizes(t[4], t[1])),
    ops.norm_moe.name: lambda t, n: operations.norm_moe(_sizes(t[6], t[3]), n["eps"]),
    ops.norm_moe_norm_fp8.name: lambda t, n: operations.norm_moe_norm_fp8(
        _sizes(t[6], t[3]), n["eps"]
    ),
    ops.attention_fp8.name: _attention,
}


def operations_for(
    manifest: Manifest, taps: Sequence[str] = (), given: Sequence[str] = ()
) -> list[Operation]:
    """The operations of all graphs of the decoder that a session or a proof runs.

    These are the graph of the artefact, those that show the output of each layer or take the
    inputs of its experts, and the one with `taps` and `given`. Values that are shown or given part
    fused ops. One library has all forms, so that a proof runs the library of the sessions.
    """
    spec, compute = manifest.spec, manifest.compute
    parted = tuple(names.out(layer.index) for layer in spec.text.all_layers)
    norms = tuple(names.layer(each.index, "ffn.norm") for each in spec.text.all_layers)
    every = ((), ()), (parted, ()), (parted, norms), (tuple(taps), tuple(given))
    graphs = (part_graph(spec, compute, "model", *each) for each in dict.fromkeys(every))
    return list(operations_of(graphs))


def operations_of(graphs: Iterable[fx.GraphModule]) -> Iterator[Operation]:
    """The operations of the fused ops in `graphs`, each once."""
    known = set[object]()
    by_target = {ops.OPS[name].target: ops.OPS[name] for name in _OF}
    for node in chain.from_iterable(each.graph.nodes for each in graphs):
        op = by_target.get(node.target)
        if op is None:
            continue
        given = fx.map_arg(node.args, lambda each: each.meta["type"])
        tensors, numbers = split(op, given)
        found = _OF[op.name](tensors, numbers)
        key = found.name, tuple(found.constants.items()), found.inputs
        if key not in known:
            known.add(key)
            yield found
