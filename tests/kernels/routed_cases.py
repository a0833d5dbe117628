"""MoE layers of every kind of routing: random operands, and what the kernels make of them."""

from collections.abc import Iterator

import torch

from benchmarks.moe_kernels import (
    error,
    error_of_routed,
    operands,
    random_weights,
    without_ties,
)
from moec.kernels.launches.prefill import Tiles
from moec.kernels.sizes import RoutedSizes
from moec.kernels.torch.routed import RoutedMoe
from moec.spec.parts.routing import Routing

#: the routings of the published models, and those that no model has yet
ROUTINGS = {
    "all": Routing(score="softmax", weighed="output"),
    "normalised": Routing(score="softmax", normalise=True, weighed="output"),
    "chosen": Routing(score="softmax_of_chosen", weighed="output"),
    "groups": Routing(
        score="sigmoid", choice="scores", bias=True, groups=2, kept_groups=1, normalise=True,
        factor=2.5, weighed="output",
    ),
    "biased softmax": Routing(
        score="softmax", choice="scores", bias=True, groups=3, kept_groups=2, weighed="output"
    ),
}  # fmt: skip


def compare(
    sizes: RoutedSizes, tokens: int, device: str, many: Tiles | None = None
) -> tuple[float, float]:
    """The error of the logits, and of the layer from those logits on."""
    given = random_weights(sizes, device)
    layer, ties = RoutedMoe(sizes, given, many=many), True
    while ties:
        x = torch.randn(tokens, sizes.dim, device=device).bfloat16()
        values = layer.run(layer.values(x))
        logits = values["logits"].sum(0)
        ties = not without_ties(operands(sizes, given, x), logits.bfloat16()).any()
    wide = x.float() @ given["router"].float().t()
    return error(logits, wide), error_of_routed(sizes, given, values)


def small() -> Iterator[tuple[str, RoutedSizes, tuple[int, ...]]]:
    """Layers that an interpreter can do: name, sizes, numbers of tokens."""
    for name, experts, top_k, shared, block, counts in (
        ("all", 8, 3, 0, 0, (1,)),
        ("normalised", 5, 2, 1, 0, (3,)),
        ("chosen", 4, 2, 2, 0, (3,)),  # one token takes the interpreter longer than three
        ("groups", 8, 3, 1, 128, (1, 18)),
        ("biased softmax", 6, 4, 0, 128, (3,)),
    ):
        dim = 256 if block else 128
        yield name, RoutedSizes(dim, 128, experts, top_k, shared, ROUTINGS[name], block), counts
