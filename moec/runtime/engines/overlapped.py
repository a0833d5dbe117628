"""Run a long prefill chunk as two halves, whose sums over ranks take turns with their products.

While the ranks add up a partial sum of one half, their GPUs compute the other half. The second half
sees the keys and values of the first, because that runs ahead by at least one sum, in every layer.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from moec.spec import names

#: the fewest tokens of a call that runs as two halves: with fewer, products are short of tokens
LEAST = 4096

#: what takes an op apart: (op, arguments) -> what waits for the sum over ranks, which has started,
#: and gives the op's result; None: the op adds up nothing
Apart = Callable[[Any, Sequence[Any]], Callable[[], Any] | None]


def pays(feeds: Mapping[str, Tensor]) -> bool:
    """Whether a call is long enough for two halves; such calls are of one sequence."""
    rows, width = feeds[names.INPUT_IDS].shape
    return rows == 1 and width >= LEAST


def halves(feeds: Mapping[str, Tensor], image: int | None) -> tuple[dict[str, Tensor], ...]:
    """The inputs of both halves of a call; `image` is the id of image tokens, if there are any.

    A half without a token that gets logits gets those of its first token.
    """
    ids = feeds[names.INPUT_IDS]
    width = ids.shape[1]
    half = width // 2
    found = []
    for start, stop in ((0, half), (half, width)):
        here = dict(feeds)
        here[names.INPUT_IDS] = ids[:, start:stop].contiguous()
        here[names.PAST_LENGTHS] = feeds[names.PAST_LENGTHS] + start
        index = feeds[names.LOGIT_INDEX]
        mine = index[:, _within(index, start, stop)] - start
        here[names.LOGIT_INDEX] = mine if mine.numel() else index.new_zeros(1, 1)
        for kind in (names.RING, names.GLOBAL):
            for name in (names.last(kind), names.total(kind)):
                if name in feeds:
                    here[name] = feeds[name] - (width - stop)
        features = feeds.get(names.IMAGE_FEATURES)
        if features is not None and image is not None:
            before, own = (
                int((ids[:, a:b] == image).sum()) for a, b in ((0, start), (start, stop))
            )
            here[names.IMAGE_FEATURES] = features[before : before + own]
        found.append(here)
    return tuple(found)


def joined(feeds: Mapping[str, Tensor], logits: Sequence[Tensor]) -> Tensor:
    """The logits [1, K, vocab] of a call from those of its halves."""
    index, half = feeds[names.LOGIT_INDEX], feeds[names.INPUT_IDS].shape[1] // 2
    first, second = (int(_within(index, *each).sum()) for each in ((0, half), (half, 2 * half + 1)))
    kept = [each[:, :count] for each, count in zip(logits, (first, second), strict=True) if count]
    return kept[0] if len(kept) == 1 else torch.cat(kept, 1)


def in_turns(
    graph: fx.GraphModule, calls: Sequence[Sequence[Any]], apart: Apart
) -> list[tuple[Any, ...]]:
    """Run `graph` on each of `calls`, from sum to sum in turns; return what each gives."""
    runs = [_run(graph, values, apart) for values in calls]
    results: dict[int, tuple[Any, ...]] = {}
    while len(results) < len(runs):
        for i, run in enumerate(runs):
            if i not in results:
                try:
                    next(run)
                except StopIteration as end:
                    results[i] = end.value
    return [results[i] for i in range(len(runs))]


def _run(
    graph: fx.GraphModule, values: Sequence[Any], apart: Apart
) -> Generator[None, None, tuple[Any, ...]]:
    """Run `graph`; give way whenever a sum over ranks has started."""
    given = iter(values)
    known: dict[fx.Node, Any] = {}
    left = {node: len(node.users) for node in graph.graph.nodes}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
            continue
        args = fx.map_arg(node.args, known.__getitem__)
        if node.op == "output":
            return tuple(args[0])
        assert node.op == "call_function"
        rest = None if node.target is getitem else apart(node.target, args)
        if rest is None:
            known[node] = node.target(*args)
        else:
            yield
            known[node] = rest()
        for used in node.all_input_nodes:
            left[used] -= 1
            if not left[used]:
                del known[used]
    raise AssertionError("a graph has an output")


def _within(index: Tensor, start: int, stop: int) -> Tensor:
    """Which columns of index [1, K] are from `start` up to `stop`: bool [K]."""
    return ((index >= start) & (index < stop))[0]
