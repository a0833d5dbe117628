"""The engine of target `torch`: an artefact's programs on the CPU, in plain torch, or on CUDA.

On CUDA the fused ops are kernels; elsewhere they are their own eager meaning, which says what the
numbers are and is not fast. Triton is imported when a session on CUDA opens, and not before.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

import moec.graph_builder.ops  # noqa: F401  a program's file names these ops
from moec.artefact.artefact import Artefact
from moec.exporters.torch.program import part_graph
from moec.graph_builder.passes.weights_as_inputs import lift_weights
from moec.runtime.batching import GPU_PREFILL_CHUNK, PREFILL_CHUNK
from moec.runtime.engines.cuda_graphs import Replays
from moec.runtime.engines.engine import Engine, Limits, Run
from moec.runtime.engines.gpu import check_device, memory_for
from moec.runtime.engines.weights import load
from moec.spec import names
from moec.spec.errors import refuse

#: what differs from one decode step to the next
MOVING = (
    names.INPUT_IDS,
    names.PAST_LENGTHS,
    names.LOGIT_INDEX,
    names.last(names.RING),
    names.last(names.GLOBAL),
)


def torch_engine(
    artefact: Artefact,
    device: str = "cpu",
    taps: Sequence[str] = (),
    part: str = "model",
    weights: Mapping[str, Tensor] | None = None,
) -> Run:
    """Open a part of `artefact`, "model" or "vision", on `device`.

    Caches are written where they are. `taps` names inner values to return as well: the part's graph
    is then built again from the spec, by what made the file, and run in its place. `weights`, by
    name and on `device`, stand in for the artefact's own, which need not be there.

    Raises:
        MoecError: no weights, or a broken program; with exit code 3 no such device, no Triton, a
            model that the kernels do not fit, or not enough memory, now or in a call.
    """
    check_device(device, str(artefact.path))
    if device == "cuda":
        from moec.kernels.sizes import check_sizes
        from moec.kernels.torch.ops import register

        check_sizes(artefact.manifest.spec)
        register()
    with memory_for(f"weights of {artefact.path}"):
        given = load(artefact, device, part) if weights is None else weights
    graph, outputs = _tapped(artefact, part, taps) if taps else _stored(artefact, part)
    flat = {_flat(name): each for name, each in given.items()}
    ports = artefact.manifest.ports(part).inputs
    known = {_flat(port.name): port.name for port in ports}
    taken = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    values: list[Any] = [flat.get(name) for name in taken]
    fed = [(i, known[name]) for i, name in enumerate(taken) if name not in flat]
    defaults = {
        port.name: torch.empty(0, port.shape[1], dtype=getattr(torch, port.dtype), device=device)  # type: ignore[arg-type]
        for port in ports
        if port.name == names.IMAGE_FEATURES
    }

    def call(feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        own = list(values)  # of this call: a list that stayed would keep its caches alive
        for i, name in fed:
            value = feeds.get(name, defaults.get(name))
            if value is None:
                raise KeyError(name)
            # How many slots are in use, the host has to know.
            own[i] = value if names.is_total(name) else value.to(device)
        return tuple(graph(*own))

    steps = Replays(call, MOVING) if device == "cuda" and part == "model" and not taps else None

    @torch.inference_mode()
    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        decode = (
            steps and feeds[names.INPUT_IDS].shape[1] == 1 and names.IMAGE_FEATURES not in feeds
        )
        first = next(iter(feeds))
        with memory_for(f"a call with {first} {list(feeds[first].shape)}"):
            results = steps(feeds) if steps and decode else call(feeds)
        return dict(zip(outputs, results, strict=True))

    return run


def _stored(artefact: Artefact, part: str) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The program in a part's file, and its outputs by name."""
    file = artefact.graph(part)
    try:
        program = torch.export.load(file)
    except Exception as error:  # torch raises whatever it stumbles over
        refuse(
            file,
            next(iter(str(error).splitlines()), type(error).__name__),
            f"a program that torch {torch.__version__} loads",
            "build the artefact again",
            exit_code=1,
            cause=error,
        )
    # As it is: the module around it would look at a thousand inputs in each call.
    return program.graph_module, tuple(p.name for p in artefact.manifest.ports(part).outputs)


def _tapped(
    artefact: Artefact, part: str, taps: Sequence[str]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The graph that a part's file was made from, with `taps` as outputs."""
    graph = part_graph(artefact.manifest.spec, artefact.manifest.compute, part, taps)
    outputs = list(graph.graph.nodes)[-1].meta["outputs"]
    return lift_weights(graph), outputs


def _flat(name: str) -> str:
    return name.replace(".", "_")


def torch_with(weights: Mapping[str, Tensor] | None) -> Engine:
    """The engine, on `weights` in place of the decoder's own if there are any.

    They are named as the artefact's and lie on the session's device: see `torch_engine`.
    """

    def opened(
        artefact: Artefact, part: str, device: str, options: str, taps: Sequence[str]
    ) -> Run:
        given = weights if part == "model" else None
        return torch_engine(artefact, device, taps, part, given)

    return Engine("torch", "torch", opened, _check, _limits, queues=True)


def _check(artefact: Artefact, device: str) -> None:
    check_device(device, str(artefact.path))


def _limits(artefact: Artefact, device: str) -> Limits:
    return Limits("buffers", GPU_PREFILL_CHUNK if device == "cuda" else PREFILL_CHUNK)


ENGINE = torch_with(None)
