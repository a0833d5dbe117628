"""Decode steps as CUDA graphs: some five hundred launches become one.

A graph knows addresses, not tensors, so each cache has one of its own for each batch size; a few
are kept. A cache at the same place, as a later generation's often is, finds the graph again.

A graph costs as much as several steps, and the last piece of a prompt may be a single token, which
looks like a step: so the first call with an address runs as it is, and the second is captured.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Call = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
#: graphs that are kept; each holds the memory of one step's inner values
MOST = 8
#: addresses that are remembered from a first call: more than a batch has rows
SEEN = 1024


class Replays:
    """Run `call` on feeds whose shapes do not change, by graphs from the second time on.

    `moving` names the inputs that are new in each call, integers for each row. Those on CUDA must
    stay where they are; any other is as it was when the graph was captured.
    """

    def __init__(self, call: Call, moving: tuple[str, ...]) -> None:
        self.call, self.moving = call, moving
        self.graphs: OrderedDict[
            object,
            tuple[torch.cuda.CUDAGraph, Tensor, dict[str, Tensor], tuple[Tensor, ...]],
        ] = OrderedDict()
        self.seen: OrderedDict[object, None] = OrderedDict()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What `call` gives; the feeds in `moving` are [batch] or [batch, 1].

        A replay does not wait for the GPU: those on it stay there, the others follow in its own
        time.
        """
        key = tuple(
            (n, x.data_ptr(), x.shape)
            for n, x in feeds.items()
            if x.is_cuda and n not in self.moving
        )
        if key not in self.graphs and key not in self.seen:
            self.seen[key] = None
            if len(self.seen) > SEEN:
                self.seen.popitem(last=False)
            return self.call(feeds)
        ours = [feeds[name].flatten() for name in self.moving]
        rows = _both(
            torch.stack(
                [torch.zeros(len(x), dtype=torch.int64) if x.is_cuda else x.long() for x in ours]
            )
        )
        if key not in self.graphs:
            self.graphs[key] = self._captured(feeds, rows)
            del self.seen[key]  # a graph that had to go starts over
            if len(self.graphs) > MOST:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        graph, given, places, results = self.graphs[key]
        given.copy_(rows.pin_memory(), non_blocking=True)
        for name, place in places.items():
            if feeds[name].is_cuda:
                place.copy_(feeds[name])
        graph.replay()
        return tuple(each.clone() for each in results)

    def _captured(
        self, feeds: Mapping[str, Tensor], rows: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        given = rows.cuda()
        places = {name: self._place(given, name, feeds[name]) for name in self.moving}

        def step() -> tuple[Tensor, ...]:
            return self.call({**feeds, **places})

        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):  # what libraries set up for a stream
            step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool=self.pool):
            results = step()
        return graph, given, places, results

    def _place(self, given: Tensor, name: str, like: Tensor) -> Tensor:
        """Where in `given` a graph finds the feed `name`, in the type and shape that `like` has."""
        count = len(self.moving) * like.numel()  # all have as many elements
        part = given[8 * count :] if like.dtype == torch.int32 else given[: 8 * count]
        rows = part.view(like.dtype).view(len(self.moving), -1)
        return rows[self.moving.index(name)].view(like.shape)


def _both(rows: Tensor) -> Tensor:
    """The bytes of `rows`, int64, then of the same as int32: no step has to convert any."""
    return torch.cat([rows.flatten().view(torch.uint8), rows.int().flatten().view(torch.uint8)])
