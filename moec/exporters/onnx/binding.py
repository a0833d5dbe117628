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
    """Turn the weight inputs of `model` into initializers that point into files below `root`.

    `entries` holds the bytes of every weight input by name; more entries do no harm.
    """
    graph = model.graph
    for weight in [each for each in graph.inputs if each.name in entries]:
        assert weight.name is not None
        entry = entries[weight.name]
        weight.const_value = ir.ExternalTensor(
            entry.file.relative_to(root).as_posix(),
            entry.offset,
            entry.nbytes,
            _DTYPES[entry.dtype],
            shape=ir.Shape(entry.shape),
            name=weight.name,
            base_dir=root,
        )
        graph.inputs.remove(weight)
        graph.register_initializer(weight)
