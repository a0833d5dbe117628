"""4-bit integers of a checkpoint in a packed file: experts joined, gate and up interleaved.

The integers do not change. Scales and zero points of a group are repeated for each block of it,
where an engine takes smaller blocks, and zero points have the order of the scales.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.spec import names
from moec.spec.model import ModelSpec
from moec.spec.parameters import parameters
from moec.spec.tensors import quantized
from moec.weights.int4.codes import in_eights, pairs, unpacked, zero_points
from moec.weights.packing import Packed, Packing
from moec.weights.shard import TensorEntry
from moec.weights.view import TORCH_DTYPES, view

#: bytes of integers that are worked on at once
STEP = 1 << 22


def joined(
    spec: ModelSpec, entries: dict[str, TensorEntry]
) -> tuple[ModelSpec, dict[str, TensorEntry]]:
    """`spec` and its tensors as what packs them sees them: an entry "int4" for each weight.

    The entry of a weight has the tensors of its matrices as `parts`: integers, scales, and zero
    points if there are any; that of a stack has an entry for each expert. The scales of `spec` are
    float32, as packed files have them.
    """
    assert spec.scheme is not None
    found, shapes = dict(entries), parameters(spec)
    for name in quantized(spec) if entries else ():
        shape = shapes[name]
        if len(shape) < 3:
            found[name] = _matrix(name, shape, [name], spec, found)
            continue
        each = [
            _matrix(names.expert_of(name, e), shape[1:], names.separate(name, e), spec, found)
            for e in range(shape[0])
        ]
        found[name] = _entry(name, shape, each)
    scheme = spec.scheme.model_copy(update={"scales": "fp32"})
    return spec.model_copy(update={"scheme": scheme}), found


def _matrix(
    name: str,
    shape: tuple[int, ...],
    parts: Sequence[str],
    spec: ModelSpec,
    found: dict[str, TensorEntry],
) -> TensorEntry:
    kinds = [lambda part: part, names.scale_of]
    if spec.scheme and spec.scheme.zero_points:
        kinds.append(names.zero_point_of)
    return _entry(name, shape, [found.pop(kind(part)) for part in parts for kind in kinds])


def _entry(name: str, shape: tuple[int, ...], parts: Sequence[TensorEntry]) -> TensorEntry:
    first, size = parts[0], sum(part.nbytes for part in parts)
    return TensorEntry(name, "int4", shape, first.file, first.offset, size, parts=tuple(parts))


def packed_rows(packing: Packing, matrix: TensorEntry) -> Iterator[tuple[Tensor, ...]]:
    """The rows of the tensors that hold one matrix in a packed file, some of them at a time."""
    each_has = 2 + packing.zero_points
    tensors = [view(part) for part in matrix.parts]
    matrices = [tensors[i : i + each_has] for i in range(0, len(tensors), each_has)]
    count, width = matrices[0][0].shape
    step = max(1, STEP // max(1, width))
    for start in range(0, count, step):
        some = [_rows(packing, each, start, start + step) for each in matrices]
        yield tuple(torch.stack(each, 1).flatten(0, 1) for each in zip(*some, strict=True))


def _rows(packing: Packing, tensors: list[Tensor], start: int, stop: int) -> tuple[Tensor, ...]:
    assert packing.group is not None
    codes, scales, *zeros = tensors
    repeat = packing.group // packing.block
    own = scales[start:stop].to(TORCH_DTYPES[packing.dtype]).repeat_interleave(repeat, 1)
    points = [zero_points(zero, len(codes))[start:stop] for zero in zeros]
    return codes[start:stop], own, *(pairs(each.repeat_interleave(repeat, 1)) for each in points)


@dataclass(frozen=True, slots=True)
class PackedPart(Packed):
    """One tensor of a checkpoint's 4-bit integers, read back from a packed weight.

    `kind` is 0 for integers, 1 for scales, 2 for zero points. A stack has `expert`, and `turn` says
    which of the `turns` matrices it is whose rows take turns.
    """

    kind: int = 0
    expert: int | None = None
    turn: int = 0
    turns: int = 1

    def read(self) -> Tensor:
        """Read the tensor as it was in the checkpoint, but for scales in float32."""
        assert self.packing.group is not None
        repeat = self.packing.group // self.packing.block
        stored = self.parts[self.kind]
        found = view(stored if self.expert is None else stored[self.expert])
        found = found[self.turn :: self.turns]
        if self.kind == 0:
            return found.flatten(1)
        if self.kind == 1:
            return found[:, ::repeat].contiguous()
        blocks = self.parts[1].shape[-1]
        return in_eights(unpacked(found)[:, :blocks:repeat])


def packed_parts(whole: Packed) -> dict[str, PackedPart]:
    """The tensors that the weight `whole` held in the checkpoint, by name."""
    source, shape = whole.packing.source, whole.shape
    kinds = (str, names.scale_of, names.zero_point_of)[: len(whole.parts)]
    experts = range(shape[0]) if len(shape) == 3 else (None,)
    found = {}
    for expert in experts:
        own = (source,) if expert is None else names.separate(source, expert)
        for turn, part in enumerate(own):
            for kind, named in enumerate(kinds):
                found[named(part)] = PackedPart(
                    whole.packing, shape, whole.parts, kind, expert, turn, len(own)
                )
    return found
