"""Attach a checkpoint's bytes to a model's unbound weights. No byte is read or copied."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from moec.weights.shard import TensorEntry

_DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}


def bind(model: ir.Model, entries: Mapping[str, TensorEntry], root: Path) -> None:
    """Point the weights of `model` into files below `root`.

    Weight inputs become initializers; weights that were bound before are bound anew. `entries`
    holds the bytes of every weight by name; entries that the model does not use do no harm.
    """
    graph = model.graph
    unbound = {each.name: each for each in graph.inputs}
    for name, entry in entries.items():
        weight = unbound.get(name) or graph.initializers.get(name)
        if weight is None:
            continue
        weight.const_value = ir.ExternalTensor(
            entry.file.relative_to(root).as_posix(),
            entry.offset,
            entry.nbytes,
            _DTYPES[entry.dtype],
            shape=ir.Shape(entry.shape),
            name=name,
            base_dir=root,
        )
        if name in unbound:
            graph.inputs.remove(weight)
            graph.register_initializer(weight)
