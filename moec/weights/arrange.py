"""What packings say, done: arrange, cast and quantise weights, and undo it."""

import torch
from torch import Tensor
from torch.nn import functional

from moec.weights.packing import Packed, Packing
from moec.weights.view import TORCH_DTYPES, view


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


def read(packed: Packed) -> Tensor:
    """The parameter that `packed` means, in float32 where it was quantised; of FP8, its codes."""
    if packed.packing.fp8:
        codes = view(packed.parts[0])
        return codes if packed.packing.arrange == "rows" else codes.transpose(-2, -1)
    if len(packed.shape) < 3:
        found = unpack(packed.packing, tuple(map(view, packed.parts)))
        return found[..., : packed.shape[-1]]
    experts = (
        unpack(packed.packing, tuple(view(part[i]) for part in packed.parts))
        for i in range(packed.shape[0])
    )
    return torch.stack(list(experts))
