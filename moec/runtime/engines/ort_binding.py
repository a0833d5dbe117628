"""Calls of an ONNX Runtime session whose inputs, outputs and buffers are bound, not copied."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moec.exporters.onnx.lowering import DTYPES
from moec.graph_builder.ops import FP8
from moec.spec import names

#: a tensor as arguments of IOBinding: device, its number, element type, shape, address
Place = tuple[str, int, int, tuple[int, ...], int]
_KINDS = {f"tensor({DTYPES[each].name.lower()})": each for each in (torch.float32, torch.int64)}


class OrtBinding:
    """Run `session` on a call's inputs by name; caches are buffers, which a call writes into.

    One binding holds the inputs, outputs and buffers; a call binds again only what has changed.
    `weights` are inputs that stay the same. `options` are the options of each run. With `queues` a
    call does not wait for the GPU: its inputs are there already.
    """

    def __init__(
        self,
        session: Any,
        device: str,
        weights: Mapping[str, Tensor] | None = None,
        options: Any = None,
        queues: bool = False,
    ) -> None:
        self._session, self._device, self._options = session, device, options
        self._queues = queues
        self._weights = dict(weights or {})
        shapes = {port.name: port.shape for port in session.get_inputs()}
        self._inputs = shapes.keys() - self._weights.keys()
        self._optional = {port.name for port in session.get_overridable_initializers()}
        self._outputs = {
            port.name: (port.shape, _KINDS.get(port.type)) for port in session.get_outputs()
        }
        # For each symbolic size, an input and the axis where a call finds its value.
        self._named = {
            dim: (name, i)
            for name, shape in reversed(shapes.items())
            for i, dim in enumerate(shape)
            if isinstance(dim, str) and name in self._inputs
        }
        self._kept = {n: names.past_of(n) for n in self._outputs if names.is_present(n)}
        # Places and not tensors: a tensor would keep the memory of a dropped cache.
        self._bound: dict[str, Place] = {}
        self._binding = self._new()

    def _new(self) -> Any:
        binding = self._session.io_binding()
        for name, weight in self._weights.items():
            binding.bind_input(name, *_place(weight))
        return binding

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the session; the caches among the results are the buffers in `feeds`."""
        bound, kept, binding = self._bound, self._kept, self._binding
        given = self._inputs | (self._optional & feeds.keys())
        places = {name: _place(feeds[name]) for name in given}
        # Start a new binding if the buffers are others, or if this call leaves an input out.
        anew = any(bound.get(past) != places[past] for past in kept.values())
        anew = anew or bool(bound.keys() - given)
        if anew:
            self._binding = binding = self._new()
            bound.clear()
        for name, place in places.items():
            # Buffers stay the same in each step. ONNX Runtime copies a tensor on another device
            # when it is bound, so that such a tensor is bound in each call.
            if bound.get(name) != place or place[0] != self._device:
                binding.bind_input(name, *place)
                bound[name] = place
        fresh = self._bind_outputs(places if anew else {})
        if not self._queues:
            binding.synchronize_inputs()
        self._session.run_with_iobinding(binding, self._options)
        late = len(fresh) + len(kept) < len(self._outputs)
        if late or not self._queues:
            binding.synchronize_outputs()
        if late:
            found = zip(self._outputs, binding.get_outputs(), strict=True)
            fresh |= {
                name: tensor_of(each)
                for name, each in found
                if name not in kept and name not in fresh
            }
        return fresh | {name: feeds[past] for name, past in kept.items()}

    def again(self) -> None:
        """Run the session once more as it is bound, into the tensors of the last call's results."""
        self._session.run_with_iobinding(self._binding, self._options)

    def _bind_outputs(self, caches: Mapping[str, Place]) -> dict[str, Tensor]:
        """Bind the outputs, new tensors where their sizes are known; and the `caches` anew."""
        fresh: dict[str, Tensor] = {}
        sizes = {dim: self._bound[name][3][i] for dim, (name, i) in self._named.items()}
        for name, (shape, kind) in self._outputs.items():
            past = self._kept.get(name)
            if past is None:
                size = [sizes.get(dim, dim) for dim in shape]
                if kind is None or not all(isinstance(dim, int) for dim in size):
                    self._binding.bind_output(name, "cpu")  # its size is known after the run
                else:
                    fresh[name] = torch.empty(size, dtype=kind, device=self._device)
                    self._binding.bind_output(name, *_place(fresh[name]))
            elif past in caches:
                self._binding.bind_output(name, *caches[past])
        return fresh


def tensor_of(value: Any) -> Tensor:
    """A result on the CPU as a tensor, without a copy."""
    found = torch.from_numpy(value.numpy())
    return found.view(FP8) if value.data_type() == "tensor(float8e4m3fn)" else found


def _place(tensor: Tensor) -> Place:
    assert tensor.is_contiguous()
    device = tensor.device
    kind = DTYPES[tensor.dtype].value
    return device.type, device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr()
