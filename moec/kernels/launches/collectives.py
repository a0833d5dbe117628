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
#: logits in which one program looks for the largest
BLOCK = 2048
#: the most words of one peer that a thread waits for
_MOST_WORDS = 8
#: with so many rows or more, on more than two GPUs, each row has an owner that adds it up
OWNED_ROWS = 12


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


def all_reduce(
    dim: int,
    tokens: int,
    what: Sum,
    rank: Rank,
    overlap: bool = False,
    owned_rows: int = OWNED_ROWS,
) -> Launch:
    """The sum over ranks of rows [tokens, dim], for at most `MOST_TOKENS` rows."""
    padded = power_of_2(dim // 2)
    warps = max(1, min(WARPS, padded // 32))
    words = max(1, min(_MOST_WORDS, padded // (32 * warps)))
    one, kinds = collectives.poll(1, words)
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
            "OWNED": rank.count > 2 and tokens >= owned_rows,
            **_peers(rank, words),
            "POLL_ONE": one,
            "KINDS_ONE": kinds,
            "PACK": words,
            "OVERLAP": overlap,
        },
        warps,
        options=early(overlap),
    )


def _peers(rank: Rank, words: int) -> dict[str, int | str]:
    """Constants of a kernel whose threads wait for `words` words of each peer."""
    text, kinds = collectives.poll(rank.count - 1, words)
    return {
        "RANK": rank.index,
        "WORLD": rank.count,
        "ROWS": MOST_TOKENS,
        "STORE": collectives.STORE,
        "POLL": text,
        "KINDS": kinds,
    }


def blocks_of(vocab: int) -> int:
    """How many programs look for the largest logit of a row."""
    return -(-vocab // BLOCK)


def likeliest(rows: int, vocab: int, first: int, rank: Rank) -> tuple[Launch, Launch]:
    """The token with the largest logit of all ranks; the `vocab` of this one begin with `first`."""
    blocks = blocks_of(vocab)
    return (
        Launch(
            collectives.best_of_block,
            (rows, blocks, 1),
            ("logits", "values", "tokens_in"),
            {"VOCAB": vocab, "BLOCK": BLOCK, "BLOCKS": blocks},
            4,
        ),
        Launch(
            collectives.likeliest,
            (rows, 1, 1),
            ("values", "tokens_in", "out", "calls", "peers"),
            {
                "FIRST": first,
                "BLOCKS": blocks,
                "BLOCKS_2": power_of_2(blocks),
                **_peers(rank, 1),
            },
            1,
        ),
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
