"""Decode steps of an ONNX Runtime session as CUDA graphs, which ONNX Runtime captures and replays.

A graph contains addresses, not tensors. Each cache therefore has its own graph for each batch size.
As in `moec.runtime.engines.cuda_graphs` the first call with an address runs without a graph.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from moec.runtime.engines.cuda_graphs import MOVING, SEEN
from moec.runtime.engines.engine import Run
from moec.runtime.engines.ort_binding import OrtBinding
from moec.spec import names

#: graphs of a session. ONNX Runtime drops none, so that further caches run without.
MOST = 32


class OrtGraphs:
    """Run the decode steps of a session.

    `bound(n)` makes the binding whose runs belong to graph n. `each` runs the calls that are not
    replayed.
    """

    def __init__(self, bound: Callable[[int], OrtBinding], each: Run) -> None:
        self._bound, self._each = bound, each
        # the binding, the inputs of each call and the results, at the addresses in the graph
        self._graphs: dict[object, tuple[OrtBinding, dict[str, Tensor], dict[str, Tensor]]] = {}
        self._seen: OrderedDict[object, None] = OrderedDict()

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The results of a step; feeds in `MOVING` are of this call, all others keep addresses."""
        fixed = {name: x for name, x in feeds.items() if x.is_cuda and name not in MOVING}
        # A captured graph belongs to the thread that captured it.
        places = ((name, x.data_ptr(), x.shape) for name, x in fixed.items())
        key = threading.get_ident(), *places
        if key in self._graphs:
            binding, given, results = self._graphs[key]
            for name, place in given.items():
                place.copy_(feeds[name])
            binding.again()
        elif key in self._seen and len(self._graphs) < MOST:
            binding = self._bound(len(self._graphs))
            given = {name: feeds[name].clone() for name in MOVING}
            found = binding({**feeds, **given})
            results = {name: x for name, x in found.items() if not names.is_present(name)}
            self._graphs[key] = binding, given, results
        else:
            self._seen[key] = None
            if len(self._seen) > SEEN:
                self._seen.popitem(last=False)
            return self._each(feeds)
        caches = {names.present_of(name): x for name, x in feeds.items() if names.is_past(name)}
        return {name: x.clone() for name, x in results.items()} | caches


def run_options(onnxruntime: Any, graph: int) -> Any:
    """Options of a run that belongs to a graph, -1: to none. It does not wait for the GPU."""
    found = onnxruntime.RunOptions()
    found.add_run_config_entry("disable_synchronize_execution_providers", "1")
    found.add_run_config_entry("gpu_graph_id", str(graph))
    return found
