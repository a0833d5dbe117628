"""Calls that reach every part of a decoder: ring borders, far positions, every token, each expert.

Each function makes calls that a `Watch` compares op by op.
"""

from typing import Any

import torch
from torch import Tensor, fx

from moec.graph_builder import ops
from moec.runtime.cache import Cache
from moec.runtime.proof.each_op.watch import Watch
from moec.runtime.session import Session
from moec.spec import names
from moec.spec.model import ModelSpec
from moec.spec.sharding import span
from moec.weights.view import STORED, TORCH_DTYPES

#: positions and slots of the caches that `far_positions` makes
ROWS, SLOTS = 8, 16
#: tokens of one call of `vocabulary`
CALL = 256
#: tokens that each expert gets, how far its logit leads, and how often an input is moved for that
EACH, MARGIN, STEPS = 4, 1.0, 1000
#: how far its score leads, where scores choose: they are at most 1
SCORE_MARGIN = 0.01


def ring_wrap(session: Session, most: int, generator: torch.Generator) -> None:
    """Prefill sequences of different length past a chunk border, twice, and decode.

    In the second call the other sequence is the long one. `most` is the most tokens of a sequence.
    """
    text = session.spec.text
    chunk = min(text.kept or 16, max(1, (most - 4) // 2))
    cache = session.new_cache(2, 1)
    for lengths in ([chunk + 2, max(1, chunk // 3)], [max(1, chunk // 4), chunk + 1], [1, 1]):
        ids = torch.randint(0, text.vocab, (2, max(lengths)), generator=generator)
        if int(cache.lengths.max()) + max(lengths) <= most:
            session.extend(ids, torch.tensor(lengths), cache)


def far_positions(seen: Watch, session: Session, generator: torch.Generator) -> int:
    """Decode one token at each of several positions, up to the last that the session takes.

    The caches hold random keys and values. `seen` compares the calls. Returns the last position.
    """
    spec, limits = session.spec, session.limits
    last = (limits.context or spec.text.max_positions) - 1
    chunk = spec.text.kept or last
    drawn = torch.randint(0, last + 1, (ROWS,), generator=generator).tolist()
    wanted = [last, last // 2, chunk, chunk - 1, *drawn]
    positions = sorted({at for at in wanted if 0 <= at <= last}, reverse=True)[:ROWS]
    if limits.context:
        for at in positions[:: max(1, ROWS // 2)]:
            cache = _random(session.new_cache(1, limits.context), generator)
            cache.lengths[:] = at
            ids = torch.randint(0, spec.text.vocab, (1, 1), generator=generator)
            seen.on(session).extend(ids, torch.tensor([1]), cache)
        return last
    _decode_far(seen, session, torch.tensor(positions), generator)
    return last


def _random(cache: Cache, generator: torch.Generator) -> Cache:
    for each in cache.tensors.values():
        each.copy_(torch.randn(each.shape, generator=generator).to(each.dtype))
    return cache


def _decode_far(seen: Watch, session: Session, past: Tensor, generator: torch.Generator) -> None:
    """Decode a token at positions `past` [B], where each cache holds the last `SLOTS` positions.

    So memory does not grow with the position. The reference has position p in slot p mod SLOTS. A
    buffer has the positions in order from slot 0, so that the caches after the call differ.
    """
    spec, text = session.spec, session.spec.text
    narrow = spec.scheme is not None and spec.scheme.cache
    dtype = STORED["fp8"] if narrow else TORCH_DTYPES[session.precision]
    buffers = session.limits.layout == "buffers"
    slots = {names.RING: min(SLOTS, text.kept or SLOTS), names.GLOBAL: SLOTS}
    ids = torch.randint(0, text.vocab, (len(past), 1), generator=generator)
    feeds = {
        names.INPUT_IDS: ids,
        names.PAST_LENGTHS: past,
        names.LENGTHS: torch.ones(len(past), dtype=torch.int64),
        names.LOGIT_INDEX: torch.zeros(len(past), 1, dtype=torch.int64),
    }
    held = {
        names.RING: past % text.chunk if text.chunk else past,  # buffers of chunks begin anew
        names.GLOBAL: past,
    }
    held = {kind: each.clamp(max=slots[kind]) for kind, each in held.items()}
    given = dict[str, Tensor]()  # what buffers have in place of these inputs, or more
    for layer in text.all_layers:
        for each in layer.caches:
            kind = names.cache_kind(each.kept)
            shape = (len(past), slots[kind], each.width)
            name, rows = names.past(layer.index, each.kind), torch.randn(shape, generator=generator)
            feeds[name] = rows.to(dtype)
            if buffers:
                moved = _in_order(feeds[name], past, held[kind], each.heads)
                own = slice(*(at // each.size for at in span(text, "kv_heads", session.rank)))
                given[name] = moved[:, own].contiguous().to(session.device)
    for kind in held:
        given[names.last(kind)] = held[kind].int()
        given[names.total(kind)] = (held[kind].max() + 1).int()
    out = session.run(feeds | given if buffers else feeds)
    kept = {name: each for name, each in out.items() if not (buffers and names.is_present(name))}
    seen.compare(feeds, kept, {})


def _in_order(rows: Tensor, past: Tensor, held: Tensor, heads: int) -> Tensor:
    """A buffer [B, heads, slots + 1, d] that holds the last `held` [B] positions of `rows`.

    In `rows` [B, slots, heads * d] position p lies in slot p mod slots.
    """
    slots = rows.shape[1]
    order = (past[:, None] - held[:, None] + torch.arange(slots)) % slots
    moved = rows[torch.arange(len(rows))[:, None], order]
    padded = torch.nn.functional.pad(moved.float(), (0, 0, 0, 1)).to(rows.dtype)
    return torch.unflatten(padded, 2, (heads, -1)).transpose(1, 2).contiguous()


def with_images(session: Session, generator: torch.Generator) -> None:
    """Run two sequences with image features: one image in the first, two in the second."""
    spec, vision, image = session.spec, session.spec.vision, session.spec.tokens.image
    assert vision is not None and image is not None
    other = 0 if image else 1
    rows = [[image] * (vision.tokens * count) for count in (1, 2)]
    rows = [[other, *row, other] for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    if width > (session.limits.context or width):
        return
    ids = torch.tensor([row + [other] * (width - len(row)) for row in rows])
    size = (3 * vision.tokens, spec.text.dim)
    features = torch.randn(size, generator=generator)
    session.trace(ids, lengths, [], features)


def vocabulary(session: Session, most: int, generator: torch.Generator) -> int:
    """Embed tokens of the vocabulary, `most` of them, each once; return how many."""
    vocab, context = session.spec.text.vocab, session.limits.context
    order = torch.randperm(vocab, generator=generator)[:most]
    width = min(CALL, context or CALL, len(order))
    for block in torch.split(order, width):
        rows = block[None]
        cache = session.new_cache(1, width if session.limits.layout == "buffers" else 0)
        session.extend(rows, torch.tensor([len(block)]), cache)
    return len(order)


def expert_inputs(
    spec: ModelSpec, precision: str, graph: fx.GraphModule, generator: torch.Generator
) -> tuple[dict[str, Tensor], int]:
    """Inputs of every MoE layer that send tokens to each of its experts.

    Each is [EACH * experts, dim], by the name of the value that it replaces. A random input is
    moved along the router's rows until its expert leads the others. Also returns the number of
    experts of all layers for which no such input was found.
    """
    text, weights = spec.text, dict(graph.named_parameters())
    ranked = {
        str(node.meta["name"]): node.args[1:]
        for node in graph.graph.nodes
        if node.target == ops.ranks.target
    }
    found, missed = dict[str, Tensor](), 0
    for layer in (layer.index for layer in text.all_layers if layer.moe):
        how = ranked.get(names.ranks(layer))

        def order(x: Tensor, router: Tensor, how: Any = how) -> Tensor:
            logits = x @ router.t()
            if how is None:
                return logits
            bias, *by = how
            given = bias and weights[str(bias.target)].double()
            return ops.ranks.eager(logits, given, *by)  # type: ignore[no-any-return]

        margin = MARGIN if how is None else SCORE_MARGIN
        router = weights[names.moe(layer, "router", "weight")].double()
        wanted = torch.randperm(len(router), generator=generator).repeat(EACH)
        size = (len(wanted), text.dim)
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        drawn = x.clone()
        step = 0.5 / router.square().sum(1).mean().clamp(min=1e-30)
        for _ in range(STEPS):
            ranks = order(x, router)
            lead = ranks.gather(1, wanted[:, None])[:, 0]
            rival = ranks.scatter(1, wanted[:, None], -torch.inf).max(1)
            behind = ~(lead - rival.values >= margin)
            if not behind.any():
                break
            x[behind] += step * (router[wanted] - router[rival.indices])[behind]
        first = order(x, router).argmax(1)
        missed += len(router) - len(torch.unique(first[first == wanted]))
        # The input of an expert that cannot lead has been moved far away, and would overflow.
        x = torch.where((first == wanted)[:, None], x, drawn)
        found[names.dense(layer, "norm")] = x.to(TORCH_DTYPES[precision])
    return found, missed


def each_expert(
    seen: Watch, session: Session, given: dict[str, Tensor], generator: torch.Generator
) -> None:
    """Run calls whose tokens have the inputs `given` [tokens, dim] of the MoE layers.

    `session` was opened for these values; `seen` compares its calls.
    """
    tokens = len(next(iter(given.values())))
    width = min(tokens, session.limits.context or tokens)
    for start in range(0, tokens, width):
        here = {name: each[start : start + width] for name, each in given.items()}
        count = min(width, tokens - start)
        ids = torch.randint(0, session.spec.text.vocab, (1, count), generator=generator)
        seen.on(session, here).trace(ids, torch.tensor([count]), [])
