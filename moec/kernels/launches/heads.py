"""The launches of attention's parts in plain programs, as data; no tensor, no torch."""

from moec.kernels.launches.launch import Buffers, Launch, power_of_2
from moec.kernels.launches.step import KEYS, PROGRAMS, of_splits
from moec.kernels.sizes import Heads
from moec.kernels.triton import heads as kernels

#: the largest head of `attend_slots`, whose tiles fit the shared memory of every architecture
LARGEST = 128


def head_norm(size: int, count: int, eps: float, gain: bool) -> Launch:
    """The RMS norm of `count` heads."""
    constants = {"SIZE": size, "SIZE_2": power_of_2(size), "EPS": eps, "GAIN": gain}
    return Launch(kernels.head_norm, (count, 1, 1), ("x", "gain", "out"), constants, 1)


def rope(size: int, heads: int, tokens: int, adjacent: bool) -> Launch:
    """The rotation of the heads of `tokens`."""
    return Launch(
        kernels.rope,
        (tokens, 1, 1),
        ("x", "cos", "sin", "out"),
        {
            "HEADS": heads,
            "HEADS_2": power_of_2(heads),
            "HALF": size // 2,
            "HALF_2": power_of_2(size // 2),
            "ADJACENT": adjacent,
        },
        4,
    )


def attend_slots(
    heads: Heads, batch: int, slots: int, scale: float
) -> tuple[tuple[Launch, Launch], Buffers]:
    """Attention of one token of each sequence over caches of `slots`, of which it sees some."""
    group, rows = heads.heads // heads.kv_heads, batch * heads.kv_heads
    splits = max(1, min(PROGRAMS // rows, -(-slots // KEYS)))
    split = {"SIZE": heads.size, "SPLITS": splits}
    launches = (
        Launch(
            kernels.attend_slots,
            (rows, splits, 1),
            ("q", "key", "value", "mask", "parts", "most", "sums", "slots"),
            {
                "KV_HEADS": heads.kv_heads,
                "GROUP": group,
                "GROUP_2": max(16, power_of_2(group)),
                "KEYS": KEYS,
                "SCALE": scale,
                **split,
            },
            4,
            2,
        ),
        Launch(
            kernels.combine_slots,
            (batch, heads.heads, 1),
            ("parts", "most", "sums", "out"),
            {"HEADS": heads.heads, "SPLITS_2": power_of_2(splits), **split},
            1,
        ),
    )
    return launches, of_splits(heads, batch, splits)
