"""Multi-head latent attention (https://arxiv.org/abs/2405.04434), with absorbed products.

The cache holds one latent vector and one rotated key of each token, for all heads. Keys and values
are never made: a head's query goes through the weights that would make its keys, so that it meets
the latent vectors themselves, and what it mixes of them goes through the weights of its values.
"""

from collections.abc import Callable

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import Builder
from moec.graph_builder.roles import Place, Role
from moec.spec import names
from moec.spec.model import LayerSpec, TextSpec

#: the product of a node with the weight of a part of attention
Product = Callable[[fx.Node, str], fx.Node]


def latent_attention(
    b: Builder,
    text: TextSpec,
    layer: LayerSpec,
    product: Product,
    x: fx.Node,
    past: fx.Node,
    ids: fx.Node,
    rope: tuple[fx.Node, fx.Node],
    mask: fx.Node,
    index: fx.Node,
) -> tuple[fx.Node, dict[str, fx.Node]]:
    """What the heads of a layer give, [B, S, heads * value], and the cache after the call."""
    latent, heads = text.latent, text.heads
    assert latent is not None
    i, at, rank = layer.index, names.attention(layer.index), latent.kv_rank

    def norm(x: fx.Node, part: str) -> fx.Node:
        weight = b.parameter(names.attention(i, part, "norm", "weight"))
        return b.emit(ops.rms_norm, x, weight, latent.norm_eps, name=f"{at}.{part}.norm")

    def part(x: fx.Node, count: int, start: int, stop: int, name: str) -> fx.Node:
        return b.emit(ops.take_part, x, count, start, stop, name=f"{at}.{name}")

    def turned(x: fx.Node, count: int, name: str) -> fx.Node:
        how = (*rope, count, text.rope_pairs)
        return b.emit(ops.rope, x, *how, name=f"{at}.{name}.rope")

    def joined(one: fx.Node, two: fx.Node, count: int, name: str) -> fx.Node:
        return b.emit(ops.join_parts, one, two, count, name=f"{at}.{name}")

    if latent.q_rank:
        query = product(norm(product(x, "q_down"), "q_down"), "q_up")
    else:
        query = product(x, "q")
    q = b.emit(ops.unpack, query, ids, name=f"{at}.q.rows")
    plain = part(q, heads, 0, latent.nope, "q.plain")
    rotated = turned(part(q, heads, latent.nope, text.head_dim, "q.turned"), heads, "q")
    up = b.parameter(names.attention(i, "kv_up", "weight"))
    absorbed = (heads, 0, latent.nope, False)
    plain = b.emit(ops.head_linear, plain, up, *absorbed, name=f"{at}.q.latent")
    q = joined(plain, rotated, heads, "q.joined")

    both = product(x, "kv_down")
    vector = norm(part(both, 1, 0, rank, "kv.latent"), "kv_down")
    key = b.emit(
        ops.unpack, part(both, 1, rank, rank + latent.rope, "k.turned"), ids, name=f"{at}.k.rows"
    )
    vector = b.emit(ops.unpack, vector, ids, name=f"{at}.kv.rows")
    new = joined(vector, turned(key, 1, "k"), 1, "kv.joined")
    place = Place(Role.KEYS, i)
    seen = b.emit(ops.cache_append, past, new, name=f"{at}.kv.seen", place=place)
    kept = b.emit(ops.cache_write, seen, index, name=names.present(i, names.LATENT))
    mixed = b.emit(
        ops.attention,
        q,
        seen,
        part(seen, 1, 0, rank, "v.seen"),
        mask,
        heads,
        1,
        text.score_scale,
        name=f"{at}.mix",
        place=Place(Role.ATTENTION, i),
    )
    values = (heads, latent.nope, latent.nope + latent.value, True)
    out = b.emit(ops.head_linear, mixed, up, *values, name=f"{at}.mix.values")
    return out, {names.LATENT: kept}
