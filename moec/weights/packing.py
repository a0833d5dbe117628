"""Rewrite weights into the layout that an engine needs: reordered, cast or quantised.

A packing says how one parameter becomes one or two stored tensors. It is data, so that a manifest
can hold it, `bind` can apply it later, and a proof can undo it. The experts of a stacked weight are
packed one by one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from moec.spec.data import DType, Frozen
from moec.spec.names import scale_of
from moec.spec.scheme import Rule, Scheme
from moec.spec.tensors import scale_shape
from moec.weights.shard import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

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
    - With `group` too, the 4-bit values are the checkpoint's own: see `moec.weights.int4`. Each
      `group` elements of a row have a scale, which all their blocks repeat; and so they have a zero
      point with `zero_points`, two in a byte.
    - With `fp8`, the quantised values are E4M3 and have the parameter's name. The scales have the
      type `dtype`; `fp8` says how many values share one, as in a scheme rule. The scale of an
      expert is repeated for each of the `parts` that it is of a checkpoint's tensors.
    - With neither, the elements are cast to `dtype`.
    """

    source: str
    arrange: Literal["rows", "transpose", "interleave"] = "rows"
    dtype: DType
    bits: Literal[4, 8] | None = None
    fp8: Literal["tensor", "expert", "channel", "block"] | None = None
    block: int = Field(default=32, ge=1)
    group: int | None = Field(default=None, ge=1)
    zero_points: bool = False
    parts: int = Field(default=1, ge=1, le=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        turned = self.arrange == "transpose" and self.fp8 in ("channel", "block", "expert")
        if self.fp8 and not turned and self.arrange != "rows":
            raise ValueError(f"fp8 {self.fp8} with arrange {self.arrange} is not supported")
        if self.group and (self.bits != 4 or self.group % self.block):
            raise ValueError(f"groups of {self.group} have 4 bits, and whole blocks")
        if self.parts > 1 and self.fp8 != "expert":
            raise ValueError("only the scale of an expert is repeated")
        if self.zero_points and not self.group:
            raise ValueError("zero points are a checkpoint's, which has groups")
        return self

    @classmethod
    def by(
        cls, source: str, dtype: str, rule: Rule | None, scheme: Scheme | None, turned: bool = False
    ) -> Self:
        """How `source` is stored: quantised by the `rule` of `scheme`, or as `dtype` without one.

        The experts that are `turned` are [out, in].
        """
        values: dict[str, object] = {"source": source, "dtype": dtype}
        if turned:
            values["arrange"] = "transpose"
        if rule and scheme and scheme.int4:
            values |= {"dtype": scheme.scales, "bits": 4, "block": scheme.block}
        elif rule and scheme:
            values |= {"dtype": scheme.scales, "fp8": rule.weight, "block": scheme.block}
        return cls.model_validate(values)

    def names(self, stored: str) -> tuple[str, ...]:
        """The names of the tensors that hold the parameter, whose checkpoint type is `stored`.

        A parameter that is stored without a change keeps its own name.
        """
        if self.bits:
            zeros = (f"{self.source}.zero_points",) if self.zero_points else ()
            return f"{self.source}.int{self.bits}", f"{self.source}.scales", *zeros
        if self.fp8:
            return self.source, scale_of(self.source)
        kept = self.arrange == "rows" and self.dtype == stored
        return (self.source if kept else f"{self.source}.{self.dtype}",)

    def shapes(self, shape: Shape) -> tuple[tuple[Shape, str], ...]:
        """Shape and type of each tensor of `names`, for a parameter of `shape`."""
        scales = scale_shape(shape, self.fp8, self.block) if self.fp8 else ()
        if self.parts > 1:
            scales = (*scales, self.parts)
        if self.arrange != "rows":
            shape = (*shape[:-2], shape[-1], shape[-2])
            if self.fp8 == "block":
                scales = (*scales[:-2], scales[-1], scales[-2])
        if self.fp8:
            return (shape, "fp8"), (scales, self.dtype)
        if not self.bits:
            return ((shape, self.dtype),)
        *lead, rows, length = shape
        blocks = -(-length // self.block)
        bytes_each = self.block * self.bits // 8
        # QMoE wants the bytes of a row in one axis, MatMulNBits wants an axis for the blocks.
        packed = (*lead, rows, blocks * bytes_each) if lead else (rows, blocks, bytes_each)
        zeros = (((*lead, rows, -(-blocks // 2)), "uint8"),) if self.zero_points else ()
        return (packed, "uint8"), ((*lead, rows, blocks), self.dtype), *zeros

    @property
    def reason(self) -> str:
        """How the bytes differ from those of the checkpoint, in a few words."""
        kind = f"stored as {self.dtype}"
        if self.bits:
            kind = f"int{self.bits} in blocks of {self.block}"
        if self.group:
            kind = f"the checkpoint's int4, scales of {self.group} for blocks of {self.block}"
        if self.fp8:
            squares = f", squares of {self.block}" if self.fp8 == "block" else ""
            kind = f"fp8, scales by {self.fp8}{squares}"
        return _ARRANGED[self.arrange] + kind


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed parameter of `shape` on disk. For FP8, `parts` starts with the quantised values."""

    packing: Packing
    shape: Shape
    parts: tuple[TensorEntry, ...]

    def in_parts(self) -> "Mapping[str, Packed]":
        """The tensors of 4-bit integers that it was made of: see `moec.weights.int4.packed`."""
        from moec.weights.int4.packed import packed_parts  # imports torch too

        return packed_parts(self)

    def read(self) -> "Tensor":
        """Read the parameter in its original shape: see `moec.weights.arrange.read`."""
        from moec.weights.arrange import read  # imports torch, which a manifest does not need

        return read(self)
