"""Runs in a process with TRITON_INTERPRET=1: MoE layers of every routing against the eager op."""

import interpreter  # noqa: F401
import torch
from routed_cases import compare, small


def main() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    for name, sizes, counts in small():
        for tokens in counts:
            print(name.replace(" ", "_"), tokens, *compare(sizes, tokens, "cpu"))


if __name__ == "__main__":
    main()
