"""Runs in a process with TRITON_INTERPRET=1: the prefill MoE against the eager op, on a CPU."""

import interpreter  # noqa: F401
import torch
from interpret import weights
from step_cases import error

from moec.graph_builder import ops
from moec.kernels.launches.prefill import Product, Tiles
from moec.kernels.sizes import Sizes
from moec.kernels.torch.prefill import PrefillMoe

CUTS = {
    "square": Product(columns=64, depth=64),
    "deep": Product(columns=64, depth=128),
    "narrow": Product(columns=32, depth=64, group=1),
}


def main() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    for experts, tokens, cut in (
        (4, 9, "square"), (3, 35, "narrow"), (2, 9, "deep"),
    ):  # fmt: skip
        sizes = Sizes(dim=128, hidden=256, experts=experts)
        given = weights(sizes)
        product = CUTS[cut]
        layer = PrefillMoe(sizes, given, Tiles(32, product, product, programs=3, hopper=False))
        x = torch.randn(tokens, sizes.dim).bfloat16()
        found = layer(x)
        expected = ops.moe_layer.eager(x, *given.values())
        print(experts, tokens, cut, error(found, expected), torch.equal(layer(x), found))


if __name__ == "__main__":
    main()
