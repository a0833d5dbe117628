"""Weights rewritten into the layout that an engine wants: arranged, cast, or quantised in blocks.

A packing says how one parameter becomes one or two tensors; it is data, so that a manifest can hold
it, `bind` can apply it later, and a proof can undo it. Fused experts are packed one by one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from moec.spec.frozen import DType, Frozen
from moec.spec.tensors import scale_of, scale_shape
from moec.weights.shard import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

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


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed parameter of `shape` on disk; of FP8, its codes alone."""

    packing: Packing
    shape: Shape
    parts: tuple[TensorEntry, ...]

    def read(self) -> "Tensor":
        """The parameter that the bytes mean, in float32 where it was quantised; or its codes."""
        from moec.weights.arrange import read  # torch, which a manifest does without

        return read(self)
