"""The launches that route tokens to experts, as data: logits, choice, and the experts' tokens."""

from typing import Any

from moec.kernels.launches.launch import Launch, early, fit, power_of_2
from moec.kernels.sizes import RoutedSizes
from moec.kernels.triton import choice, routed_decode
from moec.spec.parts.routing import Routing

#: the most tokens for which one program chooses and arranges
TOGETHER = 16
#: the most tokens whose logits are computed one by one, without a tensor core
ONE_BY_ONE = 8


def score(sizes: RoutedSizes, tokens: int, rows: int, split: int, overlap: bool) -> Launch:
    """The router's logits in `split` parts, for `rows` tokens a program; the quantised input."""
    columns = fit(sizes.experts, 4) if rows == 1 else min(64, max(16, rows))
    many = -(-sizes.experts // columns)
    return Launch(
        routed_decode.score,
        (-(-tokens // rows), many + rows, split),
        ("x", "router", "logits", "codes", "scale", "present", "largest", "tokens"),
        {
            "DIM": sizes.dim,
            "DIM_2": power_of_2(sizes.dim),
            "EXPERTS": sizes.experts,
            "EXPERTS_2": max(16, power_of_2(sizes.experts)),
            "MAXIMA": maxima_of(sizes, tokens),
            "BLOCK": sizes.block,
            "ROWS": rows,
            "COLUMNS": columns,
            "DEPTH": fit(sizes.dim // split, 512 if rows <= 16 else 128),
            "SPLIT": split,
            "OVERLAP": overlap,
        },
        warps=8 if rows == 1 else 4,
        options=early(overlap),
    )


def places_of(tokens: int) -> int:
    """The places for the assignments of an expert; one token needs none."""
    return max(16, power_of_2(tokens)) if tokens > 1 else 0


def maxima_of(sizes: RoutedSizes, tokens: int) -> int:
    """The largest magnitudes that the products for one token keep."""
    each = sizes.hidden // sizes.block if sizes.block else 1
    return sizes.slots * each if tokens == 1 else 0


def constants_of(sizes: RoutedSizes) -> dict[str, Any]:
    """Constants of a program that chooses."""
    routing = sizes.routing
    return {
        "EXPERTS": sizes.experts,
        "GROUPS": routing.groups,
        "GROUPS_2": power_of_2(routing.groups),
        "EACH_2": power_of_2(sizes.experts // routing.groups),
        "TOP_K": sizes.top_k,
        "SCORE": routing.score,
        "CHOICE": _choice_by(routing),
        "BIAS": routing.bias,
        "KEPT": routing.kept_groups,
        "NORMALISE": routing.normalise,
        "FACTOR": routing.factor,
    }


def _choice_by(routing: Routing) -> str:
    """What a program chooses by: a softmax without a bias is in the order of its logits."""
    same = routing.score == "softmax" and not routing.bias and routing.groups == 1
    return "logits" if same else routing.choice


def is_chosen_apart(sizes: RoutedSizes) -> bool:
    """Whether choosing is so much work that programs for one token do not do it themselves."""
    return _choice_by(sizes.routing) != "logits"


def choices(sizes: RoutedSizes, tokens: int, split: int, overlap: bool) -> tuple[Launch, ...]:
    """The launches between the logits and the products."""
    if tokens == 1 and not is_chosen_apart(sizes):
        return ()
    if 1 < tokens <= TOGETHER:
        return (_choose_and_arrange(sizes, tokens, split, overlap),)
    found = choose(sizes, tokens, split, overlap)
    return (found,) if tokens == 1 else (found, _arrange(sizes, tokens, overlap))


def choose(sizes: RoutedSizes, tokens: int, split: int, overlap: bool) -> Launch:
    """Choose from logits that are the sum of `split` parts."""
    return Launch(
        choice.choose,
        (tokens, 1, 1),
        ("logits", "bias", "chosen", "score", "present", "tokens"),
        {
            **constants_of(sizes),
            "SPLIT": split,
            "SHARED": sizes.shared,
            "OVERLAP": overlap,
        },
        warps=1,  # which reduces without a barrier
        options=early(overlap),
    )


def _arrange(sizes: RoutedSizes, tokens: int, overlap: bool) -> Launch:
    return Launch(
        choice.arrange,
        (-(-sizes.experts // 16), 1, 1),
        ("chosen", "present", "plan", "place", "tokens"),
        {
            "TOKENS_2": power_of_2(tokens),
            "EXPERTS": sizes.experts,
            "EXPERTS_2": max(16, power_of_2(sizes.experts)),
            "TOP_K": sizes.top_k,
            "SHARED": sizes.shared,
            "PLACES": places_of(tokens),
            "OVERLAP": overlap,
        },
        warps=4,
        options=early(overlap),
    )


def _choose_and_arrange(sizes: RoutedSizes, tokens: int, split: int, overlap: bool) -> Launch:
    return Launch(
        choice.choose_and_arrange,
        (1, 1, 1),
        ("logits", "bias", "chosen", "score", "plan", "place", "tokens"),
        {
            **constants_of(sizes),
            "TOKENS_2": power_of_2(tokens),
            "SPLIT": split,
            "SHARED": sizes.shared,
            "PLACES": places_of(tokens),
            "OVERLAP": overlap,
        },
        warps=4,
        options=early(overlap),
    )


def split_of(sizes: RoutedSizes, tokens: int) -> int:
    """The parts into which the router's inputs are split."""
    return 1 if tokens <= ONE_BY_ONE else max(1, sizes.dim // fit(sizes.dim, 512) // 2)
