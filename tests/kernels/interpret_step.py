"""Runs in a process with TRITON_INTERPRET=1: every fused op's kernels against eager, on a CPU."""

from itertools import chain

import interpreter  # noqa: F401
import step_cases
import torch


def main() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    cases = chain(
        *(step_cases.steps("cpu", *each) for each in ((128, 1), (192, 5))),
        *(step_cases.tables("cpu", 16, *each) for each in ((3, 1), (2, 5))),
        *(step_cases.experts("cpu", 128, 64, *each) for each in ((4, 3), (2, 9))),
        *(
            step_cases.attention("cpu", batch, *heads, slots, count)
            for batch, heads, slots, count in (
                (1, (4, 2, 32), 200, 1), (2, (6, 3, 16), 70, 1), (2, (2, 2, 16), 40, 5),
            )
        ),
        *(
            step_cases.plain("cpu", *each)
            for each in ((1, 4, 2, 32, 300), (3, 6, 3, 16, 70), (2, 2, 2, 16, 5))
        ),
    )  # fmt: skip
    for name, error in cases:
        print(name, error, step_cases.limit(name), sep="\t")


if __name__ == "__main__":
    main()
