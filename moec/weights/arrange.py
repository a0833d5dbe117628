"""The arithmetic of packings: arrange, cast and quantise weights, and undo it."""

import torch
from torch import Tensor
from torch.nn import functional

from moec.weights.packing import Packed, Packing
from moec.weights.view import TORCH_DTYPES, view


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
    values, scales = quantize(rows.float(), packing.bits, packing.block, dtype)
    if packing.bits == 4:
        values = values[..., 0::2] | values[..., 1::2] << 4
    return values.contiguous(), scales


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


def quantize(
    rows: Tensor, bits: int, block: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Quantise float32 rows [N, K] in blocks of `block`, with scales of type `dtype`.

    Returns the quantised values, uint8 [N, blocks, block], and the scales [N, blocks]. K is padded
    with zeros to whole blocks.

    The element with the largest magnitude of a block, whatever its sign, becomes 0. That end of the
    integer range has one more value than the other.
    """
    rows = functional.pad(rows, (0, -rows.shape[1] % block)).unflatten(1, (-1, block))  # type: ignore[no-untyped-call]
    centre = 1 << (bits - 1)
    low, high = rows.amin(2), rows.amax(2)  # [N, blocks]
    scales = (torch.where(-low > high, low, high) / -centre).to(dtype)
    inverse = torch.where(scales == 0, 0.0, 1 / scales.float())
    values = (rows * inverse[..., None]).round_().add_(centre).clamp_(0, 2 * centre - 1)
    return values.to(torch.uint8), scales


def read(packed: Packed) -> Tensor:
    """Read the parameter in its original shape.

    Integers are dequantised to float32. FP8 is not: the result is the quantised values.
    """
    packing, parts = packed.packing, packed.parts
    if packing.fp8:
        values = view(parts[0])
        return values if packing.arrange == "rows" else values.transpose(-2, -1)
    if len(packed.shape) < 3:
        return unpack(packing, tuple(map(view, parts)))[..., : packed.shape[-1]]
    experts = (
        unpack(packing, tuple(view(part[i]) for part in parts)) for i in range(packed.shape[0])
    )
    return torch.stack(list(experts))
