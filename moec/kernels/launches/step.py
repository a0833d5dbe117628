"""The launches of a decode step besides those of the MoE layers, as data; no tensor, no torch."""

from moec.kernels.launches.launch import SHARED, Buffers, Launch, early, fit, power_of_2
from moec.kernels.sizes import MOST_TOKENS, PLAIN, SMALLEST, SMALLEST_HEAD, Heads, is_head
from moec.kernels.triton import attention, norm, positions
from moec.kernels.triton.linear import linear as linear_kernel
from moec.spec.errors import refuse

#: keys that one step of attention takes
KEYS = 128
#: about how many programs fill a GPU: attention over a long context is split into so many
PROGRAMS = 264


def linear(
    width: int, dim: int, tokens: int, overlap: bool = False, shared: int = SHARED[90]
) -> Launch:
    """x [tokens, dim] by weight [width, dim].

    With few tokens there is room for deeper steps. As many steps are under way at once as fit in
    `shared` bytes of shared memory.

    Raises:
        MoecError: a layer that no tiles divide.
    """
    deep = tokens <= 16
    rows, depth = fit(width, 64), fit(dim, 256 if deep else 128)
    for name, size, found in (("width", width, rows), ("dim", dim, depth)):
        if found < SMALLEST:
            refuse(f"linear: {name}", size, f"a multiple of {SMALLEST}", PLAIN)
    columns = max(16, power_of_2(tokens))
    stages = min(6 if deep else 5, 1 + shared // ((rows + columns) * depth))
    return Launch(
        linear_kernel,
        (width // rows, 1, 1),
        ("codes", "scale", "weight", "weight_scale", "out", "tokens"),
        {
            "WIDTH": width,
            "DIM": dim,
            "TOKENS_2": columns,
            "ROWS": rows,
            "DEPTH": depth,
            "OVERLAP": overlap,
        },
        4,
        stages,
        early(overlap),
    )


def skip_norm(
    dim: int,
    tokens: int,
    eps: float,
    add: bool,
    narrow: bool,
    overlap: bool = False,
    parts: int = 1,
) -> Launch:
    """The RMS norm of x, or with `add` of x + skip; with `narrow` quantised, with per-token scales.

    With more than one of `parts`, skip is the sum of so many partial sums.
    """
    return Launch(
        norm.skip_norm,
        (tokens, 1, 1),
        (
            "x",
            "parts" if parts > 1 else "skip",
            "gain",
            "total",
            "normed",
            "codes",
            "scale",
            "tokens",
        ),
        {
            "DIM": dim,
            "DIM_2": power_of_2(dim),
            "EPS": eps,
            "ADD": add,
            "PARTS": parts,
            "NARROW": narrow,
            "OVERLAP": overlap,
        },
        _warps(dim, tokens),
        options=early(overlap),
    )


def encode(dim: int, tokens: int, overlap: bool = False) -> Launch:
    """Quantise x, with per-token scales."""
    return Launch(
        norm.encode,
        (tokens, 1, 1),
        ("x", "codes", "scale"),
        {"DIM": dim, "DIM_2": power_of_2(dim), "OVERLAP": overlap},
        _warps(dim, tokens),
        options=early(overlap),
    )


def swiglu(hidden: int, tokens: int, overlap: bool = False) -> Launch:
    """Quantise silu(gate) * up, with per-token scales; the input is [tokens, 2 * hidden]."""
    return Launch(
        norm.swiglu,
        (tokens, 1, 1),
        ("hidden", "codes", "scale"),
        {"HIDDEN": hidden, "HIDDEN_2": power_of_2(hidden), "OVERLAP": overlap},
        _warps(hidden, tokens),
        options=early(overlap),
    )


def rope_table(size: int, tokens: int) -> Launch:
    """RoPE's cosines and sines for heads of `size`."""
    return Launch(
        positions.rope_table,
        (tokens, 1, 1),
        ("positions", "rates", "cos", "sin"),
        {"HALF": size // 2},
        1,
    )


def temperature(floor: int, scale: float, tokens: int) -> Launch:
    """The factor by which each token's queries are scaled."""
    constants = {"FLOOR": floor, "SCALE": scale}
    return Launch(positions.temperature, (tokens, 1, 1), ("positions", "temperature"), constants, 1)


def rope_append(
    heads: Heads,
    tokens: int,
    rope: bool,
    eps: float | None,
    temperature: bool,
    overlap: bool = False,
) -> Launch:
    """Rotate queries and keys, append keys and values to their buffers; QK-norm with an `eps`."""
    group = _group(heads)
    return Launch(
        attention.rope_append,
        (tokens, group + 2, 1),
        ("qkv", "cos", "sin", "temperature", "key", "value", "last", "q", "steps", "slots"),
        {
            "KV_HEADS": heads.kv_heads,
            "KV_HEADS_2": power_of_2(heads.kv_heads),
            "GROUP": group,
            "SIZE": heads.size,
            "ROPE": rope,
            "NORM": eps is not None,
            "EPS": eps or 0.0,
            "TEMPERATURE": temperature,
            "OVERLAP": overlap,
        },
        2,
        options=early(overlap),
    )


def attend(
    heads: Heads,
    batch: int,
    slots: int,
    rope: bool,
    eps: float | None,
    temperature: bool,
    overlap: bool = False,
    splits: int | None = None,
) -> tuple[tuple[Launch, Launch], Buffers]:
    """`rope_append` for one token per sequence, then its attention over buffers of `slots`.

    The keys are cut into `splits`, by default as many as fill a GPU.
    """
    group, rows = _group(heads), batch * heads.kv_heads
    splits = splits or max(1, min(PROGRAMS // rows, -(-slots // KEYS)))
    split = {"SPLITS": splits, "KEYS": KEYS, "OVERLAP": overlap}
    launches = (
        Launch(
            attention.attend,
            (rows, splits, 1),
            (
                "qkv",
                "cos",
                "sin",
                "temperature",
                "key",
                "value",
                "last",
                "parts",
                "most",
                "sums",
                "slots",
            ),
            {
                "KV_HEADS": heads.kv_heads,
                "GROUP": group,
                "GROUP_2": max(16, power_of_2(group)),
                "SIZE": heads.size,
                "ROPE": rope,
                "NORM": eps is not None,
                "EPS": eps or 0.0,
                "TEMPERATURE": temperature,
                "SCALE": heads.size**-0.5,
                **split,
            },
            4,
            2,
            early(overlap),
        ),
        Launch(
            attention.combine,
            (batch, heads.heads, 1),
            ("parts", "most", "sums", "last", "out"),
            {"HEADS": heads.heads, "SIZE": heads.size, "SPLITS_2": power_of_2(splits), **split},
            1,
            options=early(overlap),
        ),
    )
    return launches, of_splits(heads, batch, splits)


def of_splits(heads: Heads, batch: int, splits: int) -> Buffers:
    """What attention writes whose keys are cut into `splits`: each split's results, and the sum."""
    each = (splits, batch, heads.heads)
    return {
        "parts": ((*each, heads.size), "fp32"),
        "most": (each, "fp32"),
        "sums": (each, "fp32"),
        "out": ((batch, heads.heads * heads.size), "bf16"),
    }


def _group(heads: Heads) -> int:
    for name, size, good, expected in (
        ("size", heads.size, is_head(heads.size), f"a power of 2, {SMALLEST_HEAD} or more"),
        ("heads", heads.heads, not heads.heads % heads.kv_heads, f"multiple of {heads.kv_heads}"),
    ):
        if not good:
            refuse(f"attention kernels: {name}", size, expected, PLAIN)
    return heads.heads // heads.kv_heads


def _warps(width: int, tokens: int) -> int:
    """Warps of a program for one row: twice as many with few rows, whose latency counts."""
    most = 32 if tokens <= MOST_TOKENS else 16
    return max(1, min(most, most * power_of_2(width) // 8192))
