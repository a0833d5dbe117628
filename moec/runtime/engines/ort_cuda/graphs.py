"""Decode steps of an ONNX Runtime session as CUDA graphs, which ONNX Runtime captures and replays.

A graph contains addresses. Each cache therefore has its own graph for each batch size. As in
`moec.runtime.engines.cuda_graphs` the first call with an address runs without a graph.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moec.runtime.engines.cuda_graphs import MOVING, SEEN
from moec.runtime.engines.engine import Run
from moec.runtime.engines.ort_binding import OrtBinding
from moec.spec import names

#: graphs of a session; ONNX Runtime drops none, so that further caches run without
MOST = 64


class OrtGraphs:
    """Run a session's decode steps. `weights` are inputs that stay the same.

    `options(n)` gives the options of runs that belong to graph n; -1: to none. `each` runs the
    calls that are not replayed.
    """

    def __init__(
        self, session: Any, device: str, weights: Mapping[str, Tensor], options: Any, each: Run
    ) -> None:
        self._session, self._device, self._weights = session, device, weights
        self._options, self._each = options, each
        self._graphs: dict[object, tuple[OrtBinding, dict[str, Tensor]]] = {}
        self._seen: OrderedDict[object, None] = OrderedDict()

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The results of a step; feeds in `MOVING` are of this call, all others keep addresses."""
        fixed = (n for n, x in feeds.items() if x.is_cuda and n not in MOVING)
        # A captured graph belongs to the thread that captured it.
        places = ((name, feeds[name].data_ptr(), feeds[name].shape) for name in fixed)
        key = threading.get_ident(), *places
        found = self._graphs.get(key)
        if found is None:
            if key not in self._seen or len(self._graphs) == MOST:
                self._seen[key] = None
                if len(self._seen) > SEEN:
                    self._seen.popitem(last=False)
                return self._each(feeds)
            given = {name: feeds[name].clone() for name in MOVING}
            options = self._options(len(self._graphs))
            binding = OrtBinding(self._session, self._device, self._weights, options, True)
            binding.keep = True
            found = self._graphs[key] = binding, given
        binding, given = found
        for name, place in given.items():
            place.copy_(feeds[name])
        results = binding({**feeds, **given})
        return {name: x if names.is_present(name) else x.clone() for name, x in results.items()}
