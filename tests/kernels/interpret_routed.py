"""Runs in a process with TRITON_INTERPRET=1: MoE layers of every routing against the eager op."""

import interpreter  # noqa: F401
import torch
from routed_cases import ROUTINGS, compare, small

from moec.kernels.launches.prefill import Product, Tiles
from moec.kernels.sizes import RoutedSizes

CUT = Product(columns=64, depth=64)


def main() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    for name, sizes, counts in small():
        for tokens in counts:
            print(name.replace(" ", "_"), tokens, *compare(sizes, tokens, "cpu"))
    tiles = Tiles(32, CUT, CUT, programs=3, hopper=False)
    for name, shared, block in (("all", 0, 0), ("groups", 2, 128)):
        sizes = RoutedSizes(128, 128, 6, 3, shared, ROUTINGS[name], block)
        print(f"many:{name}", 35, *compare(sizes, 35, "cpu", tiles))


if __name__ == "__main__":
    main()
