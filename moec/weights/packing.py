"""Weights rewritten into the layout that an engine wants: arranged, cast, or quantised in blocks.

A packing says how one parameter becomes one or two tensors; it is data, so that a manifest can hold
it, `bind` can apply it later, and a proof can undo it. Fused experts are packed one by one.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from moec.spec.frozen import DType, Frozen
from moec.spec.tensors import scale_of, scale_shape
from moec.weights.shard import TensorEntry
from moec.weights.view import TORCH_DTYPES, view

Shape = tuple[int, ...]
_ARRANGED = {"rows": "", "transpose": "transposed, ", "interleave": "gate and up interleaved, "}


class Packing(Frozen):
    """How parameter `source` is stored.

    `arrange` is "rows" (as it is), "transpose" (each expert [in, out] -> [out, in]) or "interleave"
    (the same for experts whose columns are gate, then up: row 2i is gate i, row 2i + 1 is up i).
    With `bits`, rows are quantised in blocks of `block` along their length, symmetrically: unsigned
    integers around 2^(bits-1), low nibble first, times a scale of `dtype` for each block. With
    `fp8` the parameter keeps its name, and its shape if it is not transposed, in E4M3 codes, and
    scales of `dtype` are as finely divided as that says, in squares of `block` for "block". With
    neither, the elements are of `dtype`.
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
        """The tensors that hold the parameter: its own name if nothing changes."""
        if self.bits:
            return f"{self.source}.int{self.bits}", f"{self.source}.scales"
        if self.fp8:
            return self.source, scale_of(self.source)
        kept = self.arrange == "rows" and self.dtype == stored
        return (self.source if kept else f"{self.source}.{self.dtype}",)

    def shapes(self, shape: Shape) -> tuple[tuple[Shape, str], ...]:
        """Shape and dtype of each of these tensors, for a parameter of `shape`."""
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
        # An expert's row is one string of bytes, a linear layer's is cut into blocks.
        packed = (*lead, rows, blocks * bytes_each) if lead else (rows, blocks, bytes_each)
        return ((packed, "uint8"), ((*lead, rows, blocks), self.dtype))

    @property
    def reason(self) -> str:
        """Why the bytes are not the checkpoint's own, in a few words."""
        kind = f"stored as {self.dtype}"
        if self.bits:
            kind = f"int{self.bits} in blocks of {self.block}"
        if self.fp8:
            squares = f", squares of {self.block}" if self.fp8 == "block" else ""
            kind = f"fp8, scales by {self.fp8}{squares}"
        return _ARRANGED[self.arrange] + kind


def arrange(packing: Packing, matrix: Tensor) -> Tensor:
    """One matrix (a linear layer's, or one expert's) or vector, in the order that is stored."""
    if packing.arrange == "rows":
        return matrix
    rows = matrix.t()  # [in, out] -> [out, in]
    if packing.arrange == "transpose":
        return rows
    return torch.stack(rows.chunk(2), 1).flatten(0, 1)  # [2F, D]: gate 0, up 0, gate 1, ...


def store(packing: Packing, rows: Tensor) -> tuple[Tensor, ...]:
    """Some rows of an arranged matrix, or a vector, as the tensors that hold them."""
    dtype = TORCH_DTYPES[packing.dtype]
    if not packing.bits:
        return (rows.to(dtype).contiguous(),)
    codes, scales = quantize(rows.float(), packing.bits, packing.block)
    if packing.bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes.contiguous(), scales.to(dtype)


def unpack(packing: Packing, parts: tuple[Tensor, ...]) -> Tensor:
    """What `store` made of one matrix or vector, as the matrix that it means."""
    weight = parts[0]
    if packing.bits:
        codes, scales = parts
        codes = codes.reshape(*scales.shape, -1)
        if packing.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(2)
        centre = 1 << (packing.bits - 1)
        weight = ((codes.float() - centre) * scales.float()[..., None]).flatten(1)
    if packing.arrange == "interleave":
        weight = torch.cat([weight[0::2], weight[1::2]])
    return weight if packing.arrange == "rows" else weight.t()


def quantize(rows: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """float32 [N, K] -> codes uint8 [N, blocks, block] and scales float32 [N, blocks].

    Each block's largest element, whatever its sign, becomes code 0: that end of the range has a
    code more than the other.
    """
    rows = functional.pad(rows, (0, -rows.shape[1] % block)).unflatten(1, (-1, block))  # type: ignore[no-untyped-call]
    centre = 1 << (bits - 1)
    low, high = rows.amin(2), rows.amax(2)  # [N, blocks]
    scales = torch.where(-low > high, low, high) / -centre
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    codes = (rows * inverse[..., None]).round_().add_(centre).clamp_(0, 2 * centre - 1)
    return codes.to(torch.uint8), scales


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed parameter of `shape` on disk; of FP8, its codes alone."""

    packing: Packing
    shape: Shape
    parts: tuple[TensorEntry, ...]

    def read(self) -> Tensor:
        """The parameter that the bytes mean, in float32 where it was quantised; or its codes."""
        if self.packing.fp8:
            codes = view(self.parts[0])
            return codes if self.packing.arrange == "rows" else codes.transpose(-2, -1)
        if len(self.shape) < 3:
            found = unpack(self.packing, tuple(map(view, self.parts)))
            return found[..., : self.shape[-1]]
        experts = (
            unpack(self.packing, tuple(view(part[i]) for part in self.parts))
            for i in range(self.shape[0])
        )
        return torch.stack(list(experts))
