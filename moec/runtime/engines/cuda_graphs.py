"""Run decode steps as CUDA graphs, which turn about five hundred launches into one.

A CUDA graph contains addresses, not tensors. Each cache therefore has its own graph for each batch
size, and a few graphs are kept. A later generation often gets a cache at the same address, and then
uses the same graph.

No graph can hold a call that waits for the GPU, as one does whose experts torch runs one by one in
FP8. Such calls run without graphs.

Capturing a graph costs as much as several steps. The last prefill chunk of a prompt may be a single
token and look like a decode step. The first call with an address therefore runs without a graph,
and the second one is captured.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from moec.spec import names

Call = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
#: graphs that are kept; each holds the memory of one step's intermediate values
MOST = 8
#: first calls that are remembered by their addresses; more than a batch has sequences
SEEN = 1024
#: the inputs that differ from one decode step to the next
MOVING = (
    names.INPUT_IDS,
    names.PAST_LENGTHS,
    names.LOGIT_INDEX,
    names.last(names.RING),
    names.last(names.GLOBAL),
)
#: the same for plain programs
PLAIN_MOVING = (names.INPUT_IDS, names.PAST_LENGTHS, names.LOGIT_INDEX)


class WaitsError(Exception):
    """A call waited for the GPU."""


@contextmanager
def without_waiting() -> Iterator[None]:
    """Run a block on the GPU. Meanwhile no other thread of the process may wait for the GPU.

    Raises:
        WaitsError: something in the block waits for the GPU.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise WaitsError from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Replays:
    """Run `call` on feeds of fixed shapes, with CUDA graphs from the second call on.

    `moving` names the inputs whose values and addresses change with each call; they are integers
    for each sequence. All other feeds on CUDA must keep their addresses. All other feeds on the
    host keep the values that they had when the graph was captured.

    Before a capture, `call` runs once in the block `rehearsal`, which may change what it does. If
    that raises `WaitsError`, no call is captured. If `first_only`, later captures have a rehearsal
    without the block.
    """

    def __init__(
        self,
        call: Call,
        moving: tuple[str, ...],
        rehearsal: Callable[[], AbstractContextManager[None]] = nullcontext,
        first_only: bool = False,
    ) -> None:
        self.call, self.moving = call, moving
        self.rehearsal, self.first_only = rehearsal, first_only
        self.graphs: OrderedDict[
            object,
            tuple[torch.cuda.CUDAGraph, Tensor, dict[str, Tensor], tuple[Tensor, ...]],
        ] = OrderedDict()
        self.seen: OrderedDict[object, None] = OrderedDict()
        self.pool = torch.cuda.graph_pool_handle()
        self.waits = False

    def __call__(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return what `call` returns; the feeds in `moving` are [batch] or [batch, 1].

        A replay does not wait for the GPU. Feeds on the GPU stay there, and feeds on the host are
        copied asynchronously.
        """
        key = tuple(
            (n, x.data_ptr(), x.shape)
            for n, x in feeds.items()
            if x.is_cuda and n not in self.moving
        )
        if self.waits:
            return self.call(feeds)
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
            try:
                self.graphs[key] = self._captured(feeds, rows)
            except WaitsError:
                self.waits = True
                return self.call(feeds)
            del self.seen[key]  # after it was evicted, a graph needs two calls again
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
        with (
            torch.cuda.stream(side),
            self.rehearsal(),
        ):  # lets libraries set up what they need for a stream
            step()
        if self.first_only:
            self.rehearsal = nullcontext
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool=self.pool):
            results = step()
        return graph, given, places, results

    def _place(self, given: Tensor, name: str, like: Tensor) -> Tensor:
        """The part of `given` where the graph reads the feed `name`, as a tensor like `like`."""
        count = len(self.moving) * like.numel()  # all moving feeds have as many elements
        part = given[8 * count :] if like.dtype == torch.int32 else given[: 8 * count]
        rows = part.view(like.dtype).view(len(self.moving), -1)
        return rows[self.moving.index(name)].view(like.shape)


def _both(rows: Tensor) -> Tensor:
    """The bytes of `rows` as int64 and then as int32, so that no step needs a conversion."""
    return torch.cat([rows.flatten().view(torch.uint8), rows.int().flatten().view(torch.uint8)])
