"""Runs in a process with TRITON_INTERPRET=1: the kernels for many tokens, on a CPU."""

import interpreter  # noqa: F401
import torch

from moec.kernels.launches.attend_many import Cut
from moec.kernels.launches.prefill import Product
from tests.kernels.many_cases import (
    ATTENTION,
    LINEAR,
    attention,
    attention_by_kernel,
    linear,
    linear_by_kernel,
    random_attention,
    wrong,
)


def main() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    for case in (*ATTENTION, random_attention()):
        given, expected = attention("cpu", *case)
        for cut in (None, Cut(rows=16, keys=32)):
            found = attention_by_kernel(given, 0, 1, cut)
            print("attention", *case, wrong(found, expected), sep="\t")
    for case in LINEAR:
        given, expected = linear("cpu", *case)
        for programs, cut in ((3, None), (40, Product(columns=32, depth=32, group=1))):
            found = linear_by_kernel(given, 0, programs, cut)
            print("linear", *case, wrong(found, expected), sep="\t")


if __name__ == "__main__":
    main()
