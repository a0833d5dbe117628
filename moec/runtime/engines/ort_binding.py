"""Calls of an ONNX Runtime session whose inputs, outputs and buffers are bound, not copied."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moec.exporters.onnx.lowering import DTYPES
from moec.graph_builder.ops import FP8
from moec.spec import names

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
        self._bound: dict[str, Tensor] = {}
        self._fresh: dict[str, Tensor] = {}
        #: whether calls give their results in the same tensors, as a CUDA graph does
        self.keep = False
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
        # Start a new binding if the buffers are others, or if this call leaves an input out.
        anew = any(bound.get(past) is not feeds[past] for past in kept.values())
        anew = anew or bool(bound.keys() - given)
        if anew:
            self._binding = binding = self._new()
            bound.clear()
        for name in given:
            if bound.get(name) is not feeds[name]:  # the buffers are the same in each step
                binding.bind_input(name, *_place(feeds[name]))
                bound[name] = feeds[name]
        if self.keep and self._fresh and not anew:
            self._session.run_with_iobinding(binding, self._options)
            return dict(self._fresh)
        fresh: dict[str, Tensor] = {}
        sizes = {dim: bound[name].shape[i] for dim, (name, i) in self._named.items()}
        for name, (shape, kind) in self._outputs.items():
            past = kept.get(name)
            if past is not None and anew:
                binding.bind_output(name, *_place(bound[past]))
            elif past is None:
                size = [sizes.get(dim, dim) for dim in shape]
                if kind is None or not all(isinstance(dim, int) for dim in size):
                    binding.bind_output(name, "cpu")  # its size is known only after the run
                else:
                    fresh[name] = torch.empty(size, dtype=kind, device=self._device)
                    binding.bind_output(name, *_place(fresh[name]))
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
        self._fresh = fresh if self.keep else {}
        return fresh | {name: bound[past] for name, past in kept.items()}


def tensor_of(value: Any) -> Tensor:
    """A result on the CPU as a tensor, without a copy."""
    found = torch.from_numpy(value.numpy())
    return found.view(FP8) if value.data_type() == "tensor(float8e4m3fn)" else found


def _place(tensor: Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
    """`tensor` as arguments of IOBinding: device, device number, element type, shape, address."""
    assert tensor.is_contiguous()
    device = tensor.device
    kind = DTYPES[tensor.dtype].value
    return device.type, device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr()
