"""Decode steps as CUDA graphs: some five hundred launches become one.

A graph knows addresses, not tensors, so each cache has one of its own for each batch size; a few
are kept. A cache at the same place, as a later generation's often is, finds the graph again.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moec.spec.errors import MoecError

Call = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
#: graphs that are kept; each holds the memory of one step's inner values
MOST = 8


class Replays:
    """Run `call` on feeds whose shapes do not change, by graphs.

    `moving` names the inputs that are new in each call, integers for each row. Those on CUDA must
    stay where they are; any other is as it was in the first call.
    """

    def __init__(self, call: Call, moving: tuple[str, ...]) -> None:
        self.call, self.moving = call, moving
        self.graphs: OrderedDict[
            object, tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]
        ] = OrderedDict()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What `call` gives; the feeds in `moving` are [batch] or [batch, 1].

        Nothing here waits for the GPU: those on it stay there, the others follow in its own time.
        """
        key = tuple((n, x.data_ptr(), x.shape) for n, x in feeds.items()
                    if x.is_cuda and n not in self.moving)  # fmt: skip
        ours = [feeds[name].flatten() for name in self.moving]
        rows = torch.stack(
            [torch.zeros(len(x), dtype=torch.int64) if x.is_cuda else x.long() for x in ours]
        )
        if key not in self.graphs:
            self.graphs[key] = self._captured(feeds, rows)
            if len(self.graphs) > MOST:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        graph, given, results = self.graphs[key]
        given.copy_(rows.pin_memory(), non_blocking=True)
        for place, row in zip(given, ours, strict=True):
            if row.is_cuda:
                place.copy_(row)
        graph.replay()
        return tuple(each.clone() for each in results)

    def _captured(
        self, feeds: Mapping[str, Tensor], rows: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]:
        given = rows.cuda()
        kinds = {name: (feeds[name].shape, feeds[name].dtype) for name in self.moving}

        def step() -> tuple[Tensor, ...]:
            fresh = {
                name: given[i].view(shape).to(dtype)
                for i, (name, (shape, dtype)) in enumerate(kinds.items())
            }
            return self.call({**feeds, **fresh})

        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(side):  # compiles kernels, and sets up what libraries keep
                step()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, pool=self.pool):
                results = step()
        except torch.cuda.OutOfMemoryError as error:
            raise MoecError(
                "decode on CUDA", next(iter(str(error).splitlines())), "memory for one step",
                "use a smaller batch or context: python cli.py plan",
            ) from None  # fmt: skip
        return graph, given, results
