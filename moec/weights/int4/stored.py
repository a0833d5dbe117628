"""Find the 4-bit integers of compressed-tensors: words of eight, which are read as bytes of two.

The first integer of a word is in its lowest bits, and words are little-endian. So the bytes of a
row hold two integers each, the first one in the low half.
"""

from dataclasses import replace

from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.hf.names import keys
from moec.spec.model import ModelSpec
from moec.spec.tensors import Kind, in_words, tensors
from moec.weights.checkpoint import Checkpoint
from moec.weights.shard import TensorEntry

_NEXT = "compare config.json with the weights: they are not of one model"


def in_bytes(spec: ModelSpec, checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with its 4-bit integers as bytes, and without the shapes that it repeats.

    Raises:
        MoecError: a tensor has other sizes than the spec says, or groups that are not in order.
    """
    if spec.scheme is None or not spec.scheme.int4:
        return checkpoint
    found, theirs, kinds = dict(checkpoint.tensors), keys(spec), tensors(spec)
    for name, kind in kinds.items():
        key = theirs[name]
        if kind.dtype != "uint8" or key not in found:
            continue
        found[key] = _as_bytes(found[key], kind)
        if not names.is_zero_point(name):
            stem = key.removesuffix("_packed")
            _check_order(found.get(f"{stem}_g_idx"))
            if shape := found.pop(f"{stem}_shape", None):
                _check_shape(shape, (kind.shape[0], 2 * kind.shape[1]))
    return replace(checkpoint, tensors=found)


def _as_bytes(entry: TensorEntry, kind: Kind) -> TensorEntry:
    words = in_words(kind)
    if (entry.shape, entry.dtype) != words:
        refuse(
            f"{entry.file}: {entry.name}",
            f"{entry.dtype} {list(entry.shape)}",
            f"{words.dtype} {list(words.shape)}, from the sizes and groups in config.json",
            _NEXT,
        )
    return replace(entry, dtype=kind.dtype, shape=kind.shape)


def _check_shape(entry: TensorEntry, shape: tuple[int, int]) -> None:
    """Refuse a tensor `weight_shape` that is not `shape`, that of the weight without packing."""
    if (entry.dtype, entry.shape) == ("int64", (2,)):
        with entry.file.open("rb") as file:
            file.seek(entry.offset)
            data = file.read(16)
        found = [int.from_bytes(data[at : at + 8], "little", signed=True) for at in (0, 8)]
        if found in (list(shape), [0, 0]):  # zeros: a sparse file without data
            return
        seen = str(found)
    else:
        seen = f"{entry.dtype} {list(entry.shape)}"
    refuse(f"{entry.file}: {entry.name}", seen, f"int64 {list(shape)}", _NEXT)


def _check_order(index: TensorEntry | None) -> None:
    if index:
        refuse(
            f"{index.file}: {index.name}",
            "an index of groups: the inputs of a group are not side by side",
            "groups of neighbours",
            "quantise the model again with actorder='weight', or use the bf16 checkpoint",
        )
