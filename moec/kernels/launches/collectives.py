"""The launches of what ranks compute together, as data; no tensor, no torch."""

from dataclasses import dataclass

from moec.kernels.launches.launch import Launch, early, power_of_2
from moec.kernels.sizes import MOST_TOKENS
from moec.kernels.triton import collectives
from moec.spec.sharding import Rank

#: numbers of ranks for which there is a kernel; others add up through NCCL
WORLDS = (2, 4)
#: warps of the program that adds up a token
WARPS = 32
#: the most words of one peer that a thread waits for
_MOST_WORDS = 8


@dataclass(frozen=True, slots=True)
class Sum:
    """What is added up, and what follows.

    `add`: a residual is added; `norm`: the RMS norm of the sum follows; `narrow`: quantised;
    `parts`: this rank has so many partial sums in float32, or 1: a sum in bf16.
    """

    add: bool = False
    norm: bool = False
    narrow: bool = False
    parts: int = 1
    eps: float = 0.0


def all_reduce(dim: int, tokens: int, what: Sum, rank: Rank, overlap: bool = False) -> Launch:
    """The sum over ranks of rows [tokens, dim], for at most `MOST_TOKENS` rows."""
    padded = power_of_2(dim // 2)
    warps = max(1, min(WARPS, padded // 32))
    words = max(1, min(_MOST_WORDS, padded // (32 * warps)))
    text, kinds = collectives.poll(rank.count - 1, words)
    return Launch(
        collectives.all_reduce,
        (tokens, 1, 1),
        ("x", "part", "gain", "total", "normed", "codes", "scale", "calls", "peers", "tokens"),
        {
            "DIM": dim,
            "HALF_2": padded,
            "EPS": what.eps,
            "ADD": what.add,
            "NORM": what.norm,
            "NARROW": what.narrow,
            "PARTS": what.parts,
            "RANK": rank.index,
            "WORLD": rank.count,
            "ROWS": MOST_TOKENS,
            "STORE": collectives.STORE,
            "POLL": text,
            "KINDS": kinds,
            "PACK": words,
            "OVERLAP": overlap,
        },
        warps,
        options=early(overlap),
    )


def likeliest(rows: int, first: int, rank: Rank) -> Launch:
    """The token with the largest logit of all ranks; those of this rank begin with `first`."""
    text, kinds = collectives.poll(rank.count - 1, 1)
    return Launch(
        collectives.likeliest,
        (rows, 1, 1),
        ("values", "tokens_in", "out", "calls", "peers"),
        {
            "FIRST": first,
            "RANK": rank.index,
            "WORLD": rank.count,
            "ROWS": MOST_TOKENS,
            "STORE": collectives.STORE,
            "POLL": text,
            "KINDS": kinds,
        },
        1,
    )


def summed(dim: int, tokens: int, rows: int, eps: float | None, narrow: bool, rank: Rank) -> Launch:
    """The sum of a rank's rows [tokens, dim] and those that have arrived, [ranks, rows, dim].

    With `eps` a residual is added, and the RMS norm follows; quantised if `narrow`.
    """
    return Launch(
        collectives.summed,
        (tokens, 1, 1),
        ("x", "part", "arrived", "gain", "total", "normed", "codes", "scale"),
        {
            "DIM": dim,
            "DIM_2": power_of_2(dim),
            "ROWS": rows,
            "NORM": eps is not None,
            "EPS": eps or 0.0,
            "NARROW": narrow,
            "RANK": rank.index,
            "WORLD": rank.count,
        },
        max(1, min(16, power_of_2(dim) // 512)),
    )


def embedding_part(vocab: int, dim: int, tokens: int) -> Launch:
    """The rows of a table [vocab, dim] for the tokens that are in it."""
    return Launch(
        collectives.embedding_part,
        (tokens, 1, 1),
        ("ids", "table", "out", "first"),
        {"VOCAB": vocab, "DIM": dim, "DIM_2": power_of_2(dim)},
        4,
    )
