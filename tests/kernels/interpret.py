"""Runs in a process with TRITON_INTERPRET=1: the decode MoE against the eager op, on a CPU."""

import interpreter  # noqa: F401
import torch
from step_cases import error, narrow

from moec.graph_builder import ops
from moec.kernels.launches.decode import Tiles
from moec.kernels.sizes import Sizes
from moec.kernels.torch.moe import DecodeMoe


def weights(sizes: Sizes) -> dict[str, torch.Tensor]:
    """The operands of `moe_layer`, random, the shared expert last."""
    router = (torch.randn(sizes.experts, sizes.dim) / sizes.dim**0.5).bfloat16()
    gate_up = narrow(sizes.experts + 1, 2 * sizes.hidden, sizes.dim, device="cpu")
    down = narrow(sizes.experts + 1, sizes.dim, sizes.hidden, device="cpu")
    names = ("router", "gate_up", "gate_up_scale", "down", "down_scale")
    return dict(zip(names, (router, *gate_up, *down), strict=True))


def main() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    small = {"gate_up_rows": 64, "gate_up_depth": 64, "down_rows": 64, "down_depth": 64}
    for experts, counts in ((4, (1, 5)), (16, (2,)), (1, (2,))):
        sizes = Sizes(dim=128, hidden=128, experts=experts)
        given = weights(sizes)
        for tokens in counts:
            tiles = Tiles(**small, split=2)
            x = torch.randn(tokens, sizes.dim).bfloat16()
            layer = DecodeMoe(sizes, given, tiles)
            found = layer(x)
            expected = ops.moe_layer.eager(x, *given.values())
            print(experts, tokens, error(found, expected), torch.equal(layer(x), found))


if __name__ == "__main__":
    main()
