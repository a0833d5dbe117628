"""Runs in a process with TRITON_INTERPRET=1: the decode MoE against the eager op, without a GPU."""

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

from moec.kernels import twin
from moec.kernels.launch import Sizes, Tiles
from moec.kernels.torch_moe import DecodeMoe
from moec.weights import fp8

NARROW = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16}
_convert = interpreter._convert_float


def _rounding(values, source, target, mode):  # type: ignore[no-untyped-def]
    """The interpreter's own conversions truncate to bf16 and carry wrongly to E4M3."""
    if source == tl.float32 and target in NARROW:
        wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32).copy())
        size = torch.uint8 if target == tl.float8e4nv else torch.uint16
        return wide.to(NARROW[target]).view(size).numpy().reshape(values.shape)
    return _convert(values, source, target, mode)


interpreter._convert_float = _rounding


def weights(sizes: Sizes) -> dict[str, torch.Tensor]:
    """Random experts in FP8, the shared one last."""
    found = {"router": (torch.randn(sizes.experts, sizes.dim) / sizes.dim**0.5).bfloat16()}
    for name, out, inner in (
        ("gate_up", 2 * sizes.hidden, sizes.dim),
        ("down", sizes.dim, sizes.hidden),
    ):
        wide = torch.randn(sizes.experts + 1, out, inner) / inner**0.5
        scale = torch.stack(
            [fp8.scales(fp8.magnitudes(each, "row", 1), torch.float32) for each in wide]
        )
        codes = torch.empty(wide.shape, dtype=torch.float8_e4m3fn)
        for each, one, into in zip(wide, scale, codes, strict=True):
            fp8.codes(each, one, "row", 1, into)
        found |= {name: codes, f"{name}_scale": scale}
    return found


def main() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    small = {"gate_up_rows": 32, "gate_up_depth": 64, "down_rows": 32, "down_depth": 64}
    for experts, counts in ((4, (1, 3, 4, 9)), (16, (2, 20)), (1, (1, 2))):
        sizes = Sizes(dim=128, hidden=256, experts=experts)
        given = weights(sizes)
        for tokens in counts:
            tiles = Tiles(**small, split=2)
            x = torch.randn(tokens, sizes.dim).bfloat16()
            layer = DecodeMoe(sizes, tokens, given, tiles)
            found = layer(x).clone()
            expected = twin.decode_moe(given, x)
            error = ((found.float() - expected).norm() / expected.norm()).item()
            again = torch.equal(layer(x), found)
            print(experts, tokens, error, again, int(layer.values["arrived"].abs().max()))


if __name__ == "__main__":
    main()
