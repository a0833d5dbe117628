"""Rewrite weights into the layout that an engine needs: reordered, cast or quantised.

A packing says how one parameter becomes one or two stored tensors. It is data, so that a manifest
can hold it, `bind` can apply it later, and a proof can undo it. The experts of a stacked weight are
packed one by one.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from moec.spec.frozen import DType, Frozen
from moec.spec.names import scale_of
from moec.spec.tensors import scale_shape
from moec.weights.shard import TensorEntry
from moec.weights.view import TORCH_DTYPES, view

Shape = tuple[int, ...]
_ARRANGED = {"rows": "", "transpose": "transposed, ", "interleave": "gate and up interleaved, "}


class Packing(Frozen):
    """How the parameter `source` is stored.

    `arrange` orders the elements:

    - "rows" keeps them as they are;
    - "transpose" turns each expert from [in, out] to [out, in];
    - "interleave" does the same for experts whose columns are gate and then up; row 2i becomes
      gate i and row 2i + 1 becomes up i.

    `bits` and `fp8` quantise the elements:

    - With `bits`, each row is quantised symmetrically in blocks of `block` elements. The quantised
      values are unsigned integers around 2^(bits-1), and each block has a scale of `dtype`. Two
      4-bit values share a byte, the first one in the low nibble.
    - With `fp8`, the quantised values are E4M3 and have the parameter's name. The scales have the
      type `dtype`; `fp8` says how many values share one, as in a scheme rule.
    - With neither, the elements are cast to `dtype`.
    """

    source: str
    arrange: Literal["rows", "transpose", "interleave"] = "rows"
    dtype: DType
    bits: Literal[4, 8] | None = None
    fp8: Literal["tensor", "expert", "channel", "block"] | None = None
    block: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        plain = self.arrange == "rows" or (self.arrange, self.fp8) == ("transpose", "channel")
        if self.fp8 and not plain:
            raise ValueError(f"fp8 {self.fp8} with arrange {self.arrange} is not supported")
        return self

    def names(self, stored: str) -> tuple[str, ...]:
        """The names of the tensors that hold the parameter, whose checkpoint type is `stored`.

        A parameter that is stored without a change keeps its own name.
        """
        if self.bits:
            return f"{self.source}.int{self.bits}", f"{self.source}.scales"
        if self.fp8:
            return self.source, scale_of(self.source)
        kept = self.arrange == "rows" and self.dtype == stored
        return (self.source if kept else f"{self.source}.{self.dtype}",)

    def shapes(self, shape: Shape) -> tuple[tuple[Shape, str], ...]:
        """Shape and type of each tensor of `names`, for a parameter of `shape`."""
        scales = scale_shape(shape, self.fp8, self.block) if self.fp8 else ()
        if self.arrange != "rows":
            shape = (*shape[:-2], shape[-1], shape[-2])
        if self.fp8:
            return (shape, "fp8"), (scales, self.dtype)
        if not self.bits:
            return ((shape, self.dtype),)
        *lead, rows, length = shape
        blocks = -(-length // self.block)
        bytes_each = self.block * self.bits // 8
        # QMoE wants the bytes of a row in one axis, MatMulNBits wants an axis for the blocks.
        packed = (*lead, rows, blocks * bytes_each) if lead else (rows, blocks, bytes_each)
        return ((packed, "uint8"), ((*lead, rows, blocks), self.dtype))

    @property
    def reason(self) -> str:
        """How the bytes differ from those of the checkpoint, in a few words."""
        kind = f"stored as {self.dtype}"
        if self.bits:
            kind = f"int{self.bits} in blocks of {self.block}"
        if self.fp8:
            squares = f", squares of {self.block}" if self.fp8 == "block" else ""
            kind = f"fp8, scales by {self.fp8}{squares}"
        return _ARRANGED[self.arrange] + kind


def arrange(packing: Packing, matrix: Tensor) -> Tensor:
    """Order one matrix (a linear layer's, or one expert's) or vector as it is stored."""
    if packing.arrange == "rows":
        return matrix
    rows = matrix.t()  # [in, out] -> [out, in]
    if packing.arrange == "transpose":
        return rows
    return torch.stack(rows.chunk(2), 1).flatten(0, 1)  # [2F, D]: gate 0, up 0, gate 1, ...


def store(packing: Packing, rows: Tensor) -> tuple[Tensor, ...]:
    """Cast or quantise some rows of an arranged matrix, or a vector, to the tensors on disk.

    FP8 is not done here; see `moec.weights.fp8`.
    """
    dtype = TORCH_DTYPES[packing.dtype]
    if not packing.bits:
        return (rows.to(dtype).contiguous(),)
    values, scales = quantize(rows.float(), packing.bits, packing.block)
    if packing.bits == 4:
        values = values[..., 0::2] | values[..., 1::2] << 4
    return values.contiguous(), scales.to(dtype)


def unpack(packing: Packing, parts: tuple[Tensor, ...]) -> Tensor:
    """Undo `arrange` and `store`: the matrix or vector that the stored tensors `parts` mean."""
    weight = parts[0]
    if packing.bits:
        values, scales = parts
        values = values.reshape(*scales.shape, -1)
        if packing.bits == 4:
            values = torch.stack([values & 15, values >> 4], -1).flatten(2)
        centre = 1 << (packing.bits - 1)
        weight = ((values.float() - centre) * scales.float()[..., None]).flatten(1)
    if packing.arrange == "interleave":
        weight = torch.cat([weight[0::2], weight[1::2]])
    return weight if packing.arrange == "rows" else weight.t()


def quantize(rows: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Quantise float32 rows [N, K] in blocks of `block`.

    Returns the quantised values, uint8 [N, blocks, block], and the scales, float32 [N, blocks]. K
    is padded with zeros to whole blocks.

    The element with the largest magnitude of a block, whatever its sign, becomes 0. That end of the
    integer range has one more value than the other.
    """
    rows = functional.pad(rows, (0, -rows.shape[1] % block)).unflatten(1, (-1, block))  # type: ignore[no-untyped-call]
    centre = 1 << (bits - 1)
    low, high = rows.amin(2), rows.amax(2)  # [N, blocks]
    scales = torch.where(-low > high, low, high) / -centre
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    values = (rows * inverse[..., None]).round_().add_(centre).clamp_(0, 2 * centre - 1)
    return values.to(torch.uint8), scales


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed parameter of `shape` on disk. For FP8, `parts` starts with the quantised values."""

    packing: Packing
    shape: Shape
    parts: tuple[TensorEntry, ...]

    def read(self) -> Tensor:
        """Read the parameter in its original shape.

        Integers are dequantised to float32. FP8 is not: the result is the quantised values.
        """
        if self.packing.fp8:
            values = view(self.parts[0])
            return values if self.packing.arrange == "rows" else values.transpose(-2, -1)
        if len(self.shape) < 3:
            found = unpack(self.packing, tuple(map(view, self.parts)))
            return found[..., : self.shape[-1]]
        experts = (
            unpack(self.packing, tuple(view(part[i]) for part in self.parts))
            for i in range(self.shape[0])
        )
        return torch.stack(list(experts))
