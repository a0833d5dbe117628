"""The launches of what ranks compute together, as data; no tensor, no torch."""

from dataclasses import dataclass

from moec.kernels.launches.launch import Launch, early, power_of_2
from moec.kernels.peers import prefill, sums, tokens, words
from moec.kernels.sizes import MOST_TOKENS
from moec.spec.sharding import OWNED_ROWS, Rank

#: numbers of ranks for which there is a kernel; others add up through NCCL
WORLDS = (2, 4)
#: warps of the program that adds up a token
WARPS = 32
#: the most rows of a sum in prefill that the kernels take: those of a prefill chunk on a GPU
PREFILL_ROWS = 8192
#: warps of a program that treats a row in prefill
PREFILL_WARPS = 8
#: logits in which one program looks for the largest
BLOCK = 2048
#: the most words of one peer that a thread waits for
_MOST_WORDS = 8
#: rows of bf16 are pairs; what follows are addresses, calls, and tokens of ranks
_TYPES = {
    **dict.fromkeys(("x", "part", "gain", "total", "normed", "calls", "tokens_in"), "*i32"),
    **dict.fromkeys(("peers", "ids", "out"), "*i64"),
    **dict.fromkeys(("share", "first"), "i32"),
    "values": "*fp32",
    "logits": "*bf16",
}


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
    rows: int,
    what: Sum,
    rank: Rank,
    overlap: bool = False,
) -> Launch:
    """The sum over ranks of `rows` of `dim`, at most `MOST_TOKENS`."""
    padded = power_of_2(dim // 2)
    warps = max(1, min(WARPS, padded // 32))
    count = max(1, min(_MOST_WORDS, padded // (32 * warps)))
    one, kinds = words.poll(1, count)
    return Launch(
        sums.all_reduce,
        (rows, 1, 1),
        ("x", "part", "gain", "total", "normed", "codes", "scale", "calls", "peers", "tokens"),
        {
            "DIM": dim,
            "HALF_2": padded,
            "EPS": what.eps,
            "ADD": what.add,
            "NORM": what.norm,
            "NARROW": what.narrow,
            "PARTS": what.parts,
            "OWNED": rank.count == 4 and rows >= OWNED_ROWS,
            **_peers(rank, count),
            "POLL_ONE": one,
            "KINDS_ONE": kinds,
            "PACK": count,
            "OVERLAP": overlap,
        },
        warps,
        options=early(overlap),
        types=_TYPES | {"part": "*i32" if what.parts == 1 else "*i64"},
    )


def share_of(rows: int, rank: Rank) -> int:
    """How many of `rows` a rank owns in prefill; the last ranks may own fewer."""
    return -(-rows // rank.count)


def shared_rows(rank: Rank) -> int:
    """Rows of each part of the memory that peers write into in prefill."""
    return share_of(PREFILL_ROWS, rank) * rank.count


def shared_words(dim: int, rank: Rank) -> int:
    """Words of four bytes of that memory: parts, results and sums of all rows, and their scales."""
    return shared_rows(rank) * (3 * (dim // 2) + 1)


def prefill_sum(
    dim: int, rows: int, what: Sum, rank: Rank, whole: bool = False
) -> tuple[Launch, Launch]:
    """The sum over ranks of `rows` of `dim`, at most `PREFILL_ROWS`, and its norm.

    The ranks meet at a barrier after each launch. With `whole` all ranks get all sums.
    """
    share = share_of(rows, rank)
    constants = {
        "DIM": dim,
        "HALF_2": power_of_2(dim // 2),
        "SHARE_MOST": share_of(PREFILL_ROWS, rank),
        "RANK": rank.index,
        "WORLD": rank.count,
    }
    return (
        Launch(
            prefill.send_parts,
            (share * (rank.count - 1), 1, 1),
            ("part", "peers", "tokens", "share"),
            constants,
            PREFILL_WARPS,
            types=_TYPES,
        ),
        Launch(
            prefill.add_owned,
            (share, 1, 1),
            ("x", "part", "gain", "total", "peers", "tokens", "share"),
            {**constants, "EPS": what.eps, "NARROW": what.narrow, "WHOLE": whole},
            PREFILL_WARPS,
            types=_TYPES,
        ),
    )


def _peers(rank: Rank, count: int) -> dict[str, int | str]:
    """Constants of a kernel whose threads wait for `count` words of each peer."""
    text, kinds = words.poll(rank.count - 1, count)
    return {
        "RANK": rank.index,
        "WORLD": rank.count,
        "ROWS": MOST_TOKENS,
        "STORE": words.STORE,
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
            tokens.best_of_block,
            (rows, blocks, 1),
            ("logits", "values", "tokens_in"),
            {"VOCAB": vocab, "BLOCK": BLOCK, "BLOCKS": blocks},
            4,
            types=_TYPES,
        ),
        Launch(
            tokens.likeliest,
            (rows, 1, 1),
            ("values", "tokens_in", "out", "calls", "peers"),
            {
                "FIRST": first,
                "BLOCKS": blocks,
                "BLOCKS_2": power_of_2(blocks),
                **_peers(rank, 1),
            },
            1,
            types=_TYPES,
        ),
    )


def embedding_part(vocab: int, dim: int, count: int) -> Launch:
    """The rows of a table [vocab, dim] for those of `count` tokens that are in it."""
    return Launch(
        tokens.embedding_part,
        (count, 1, 1),
        ("ids", "table", "out", "first"),
        {"VOCAB": vocab, "DIM": dim, "DIM_2": power_of_2(dim)},
        4,
        types=_TYPES | {"table": "*bf16", "out": "*bf16"},
    )
