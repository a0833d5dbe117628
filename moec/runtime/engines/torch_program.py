"""The engine of target `torch`: it runs an artefact's programs on the CPU or on CUDA.

It builds each program from the artefact's spec, and never loads the file of a program.

On CUDA the fused FP8 ops run moec's kernels. On the CPU they run their eager code in plain torch,
which gives the right numbers and is slow. Triton is imported only when a session on CUDA opens.
Plain programs run torch's own operators, and on CUDA moec's kernels for FP8 products and for norms,
RoPE and attention in bf16. Their calls return new caches. Decode steps have a program of their own,
which writes into the caches that it is given: such steps can be CUDA graphs.

A fused decoder has two programs: one gives logits, and one the likeliest tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache as once
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, fx

from moec.artefact.artefact import Artefact, check_graph
from moec.artefact.manifest import NAME, Port, Ports
from moec.exporters.builder import builder_for
from moec.exporters.torch.program import part_graph, ports_of
from moec.graph_builder.passes.fused.shard import is_partial
from moec.graph_builder.passes.plain.in_place import has_wide_caches, is_shown
from moec.graph_builder.passes.weights_as_inputs import lift_weights
from moec.graph_builder.plain import build_step
from moec.graph_builder.roles import WHOLE
from moec.graph_builder.types import TensorType
from moec.runtime.batching import GPU_PLAIN_CHUNK, GPU_PREFILL_CHUNK, PREFILL_CHUNK
from moec.runtime.engines.bound import Bound
from moec.runtime.engines.cuda_graphs import MOVING, PLAIN_MOVING, Call, Replays, without_waiting
from moec.runtime.engines.engine import Engine, Limits, Run
from moec.runtime.engines.gpu import check_device, memory_for
from moec.runtime.engines.weights import load
from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.mtp.model import mtp_of
from moec.spec.sharding import ALONE, Rank, check_ranks, local
from moec.weights.joined import FUSED, PLAIN


def torch_engine(
    artefact: Artefact,
    device: str = "cpu",
    taps: Sequence[str] = (),
    part: str = "model",
    weights: Mapping[str, Tensor] | None = None,
    set_values: Sequence[str] = (),
    rank: Rank = ALONE,
) -> Run:
    """Open a part of `artefact`, "model" or "vision", on `device`.

    A call may write into the caches that it is given.

    Args:
        taps: inner values that a call returns besides the outputs.
        weights: tensors on `device`, by name, to use in place of the artefact's weights, which may
            be missing then.
        set_values: inner values for which a call gets inputs "NAME.given".
        rank: the rank that this process is; all ranks then make the same calls in the same order.

    Raises:
        MoecError: the artefact has no weights, the part's file is damaged, another version of moec
            built it, or ranks cannot share it. With exit code 3: the device or Triton is missing,
            the kernels do not support the model's sizes, or memory is short, now or in a call.
    """
    _check(artefact, device)
    check_shared(artefact, rank)
    fused, narrow = _is_fused(artefact), artefact.manifest.spec.fp8 is not None
    rehearsal: Callable[[], AbstractContextManager[None]] = nullcontext
    if device == "cuda" and (narrow or _may_use_kernels()):
        from moec.kernels.sizes import check_sizes
        from moec.kernels.torch.ops import register

        if fused:
            check_sizes(local(artefact.manifest.spec, rank))
        register()
        if rank.count > 1 and part == "model":
            from moec.kernels.torch import collectives

            collectives.meet(artefact.manifest.spec.text.dim, rank)
            rehearsal = collectives.alone
    with memory_for(f"weights of {artefact.path}"):
        given = load(artefact, device, part, rank) if weights is None else weights
    check_graph(artefact, part)
    decoder = fused and part == "model" and not taps

    def program(greedy: bool) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        graph, ports = _program(artefact, part, taps, set_values, rank, greedy)
        outputs = [port.name for port in ports.outputs]
        optional = (port for port in ports.inputs if port.name == names.IMAGE_FEATURES)
        defaults = {each.name: _nothing(each, device) for each in optional}
        bound = Bound(graph, given, {port.name for port in ports.inputs}, defaults, device)
        steps = Replays(bound, MOVING, rehearsal) if device == "cuda" and decoder else None

        def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
            one = feeds[names.INPUT_IDS].shape[1] == 1 if steps else False
            replays = one and names.IMAGE_FEATURES not in feeds
            return dict(zip(outputs, (steps if steps and replays else bound)(feeds), strict=True))

        return run

    logits, best = program(False), once(lambda: program(True))
    apart = not fused and part == "model" and not set_values
    apart = apart and not (taps and is_shown(_graph(artefact, part), taps))
    if apart and has_wide_caches(artefact.manifest.spec):
        logits = _or_step(logits, artefact, taps, given, device)

    @torch.inference_mode()
    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first = next(iter(feeds))
        with memory_for(f"a call with {first} {list(feeds[first].shape)}"):
            return best()(feeds) if names.GREEDY in feeds else logits(feeds)

    return run


def _or_step(
    other: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    artefact: Artefact,
    taps: Sequence[str],
    weights: Mapping[str, Tensor],
    device: str,
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """`other`, but for decode steps of a plain decoder, which write into the caches in place."""

    @once
    def step() -> tuple[list[str], Call]:
        graph = build_step(artefact.manifest.spec, artefact.manifest.compute, taps)
        ports = ports_of(graph)
        known = {port.name for port in ports.inputs}
        call: Call = Bound(lift_weights(graph), weights, known, {}, device)
        if device == "cuda":
            call = Replays(call, PLAIN_MOVING, without_waiting, True)
        return [port.name for port in ports.outputs], call

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        caches = {name: cache for name, cache in feeds.items() if names.is_past(name)}
        one = feeds[names.INPUT_IDS].shape[1] == 1 and names.IMAGE_FEATURES not in feeds
        # The program would copy caches of another device, and write into the copies alone.
        if not one or any(c.shape[1] == 0 or c.device.type != device for c in caches.values()):
            return other(feeds)
        outputs, call = step()
        found = dict(zip(outputs, call(feeds), strict=True))
        return found | {names.present_of(name): each for name, each in caches.items()}

    return run


def _may_use_kernels() -> bool:
    """Whether moec's kernels run here for programs that could do without them."""
    return bool(find_spec("triton")) and torch.cuda.get_device_capability() >= (8, 0)


def _nothing(port: Port, device: str) -> Tensor:
    """An input of no rows."""
    width = port.shape[1]
    assert isinstance(width, int)
    return torch.empty(0, width, dtype=getattr(torch, port.dtype), device=device)


def _program(
    artefact: Artefact,
    part: str,
    taps: Sequence[str],
    given: Sequence[str],
    rank: Rank,
    greedy: bool,
) -> tuple[fx.GraphModule, Ports]:
    """The program of a part, and its inputs and outputs; `taps` are the last outputs.

    The program is built from the spec, as it was when the artefact was built. The part's file is
    not loaded: torch would unpickle members of it, which runs any code that they hold.

    Raises:
        MoecError: the manifest names other inputs and outputs (exit code 1).
    """
    graph = _graph(artefact, part, taps, given, rank, greedy)
    ports, added = ports_of(graph), {*taps, *map(names.given, given)}
    said = artefact.manifest.ports(part)
    for kind in ("inputs",) if greedy else ("inputs", "outputs"):
        here, named = ({x.name for x in getattr(each, kind)} for each in (ports, said))
        if odd := [*sorted(here - named - added), *sorted(named - here)]:
            refuse(
                f"{artefact.path / NAME}: {kind} of {part}, {odd[0]}",
                "none in the manifest" if odd[0] in here else "none in the program",
                "the names of the program",
                "build the artefact again",
                exit_code=1,
            )
    return lift_weights(graph), ports


def _graph(
    artefact: Artefact,
    part: str,
    taps: Sequence[str] = (),
    given: Sequence[str] = (),
    rank: Rank = ALONE,
    greedy: bool = False,
) -> fx.GraphModule:
    manifest = artefact.manifest
    dialect = PLAIN if manifest.dialect == PLAIN else FUSED  # that of target ort-cuda is, too
    how = (taps, given, dialect, rank, greedy)
    return part_graph(manifest.spec, manifest.compute, part, *how)


def _is_fused(artefact: Artefact) -> bool:
    """Whether the programs are of fused ops, and not plain.

    Raises:
        MoecError: another version of moec built the artefact.
    """
    builder_for(artefact)
    return artefact.manifest.dialect == FUSED


def check_shared(artefact: Artefact, rank: Rank) -> None:
    """Refuse ranks that cannot share `artefact`.

    Raises:
        MoecError: its program is not of fused ops; or a size cannot be divided among the ranks.
    """
    if rank.count == 1:
        return
    if not _is_fused(artefact):
        refuse(
            f"{artefact.path}: {rank.count} ranks",
            f"programs of {artefact.manifest.dialect}",
            "programs of fused FP8 ops, which ranks can share",
            "use one GPU; moec build --precision fp8 makes fused programs of Llama 4",
        )
    check_ranks(artefact.manifest.spec, rank.count)


def torch_with(weights: Mapping[str, Tensor] | None, rank: Rank = ALONE) -> Engine:
    """The record of the engine that uses `weights` in place of the decoder's own.

    `weights` and `rank` are as in `torch_engine`; with None the engine loads the artefact's
    weights, or the rank's part of them.
    """

    def opened(
        artefact: Artefact,
        part: str,
        device: str,
        options: str,
        taps: Sequence[str],
        given: Sequence[str] = (),
    ) -> Run:
        own = weights if part == "model" else None
        return torch_engine(artefact, device, taps, part, own, given, rank)

    def limits(artefact: Artefact, device: str) -> Limits:
        check_shared(artefact, rank)
        return _limits(artefact, device)

    return Engine(
        "torch",
        "torch" if rank.count == 1 else f"torch, {rank.count} ranks",
        opened,
        _check,
        limits,
        queues=True,
        shown=partial(shown, rank=rank),
        gives=opened,
        rank=rank,
        of_rank=partial(torch_with, None),
    )


def shown(artefact: Artefact, part: str, wanted: Sequence[str], rank: Rank = ALONE) -> list[str]:
    """Those of the names `wanted` that no fused op hides, and that a rank has all of."""
    fused = artefact.manifest.dialect != PLAIN
    known = {
        node.meta["name"]
        for node in _graph(artefact, part, rank=rank).graph.nodes
        if node.op == "call_function" and (not fused or _is_the_decoders(node))
        if rank.count == 1 or _is_whole(node)
    }
    spec = artefact.manifest.spec
    layers = (mtp_of(spec) if part == "mtp" else spec).text.all_layers
    known.add(names.out(layers[-1].index))  # a rank's graph has it where it is tapped
    for layer in layers:
        if layer.moe:  # see `build_fused` and `build_plain`
            known |= {names.router(layer.index), layer.ranked_by, names.chosen(layer.index)}
    return [name for name in wanted if name in known]


def _is_the_decoders(node: fx.Node) -> bool:
    """Whether a node of the fused graph is the decoder's value of that name.

    The passes move the role of a value to the node that takes its place. Other nodes within a layer
    may only share the name, but for the residual stream.
    """
    name, in_layer = str(node.meta["name"]), names.layer_of(node.meta["name"]) is not None
    if not isinstance(node.meta["type"], TensorType):
        return False
    return not in_layer or "role" in node.meta or name.endswith((".out", ".residual"))


def _is_whole(node: fx.Node) -> bool:
    """Whether a node of a rank's graph is no partial sum and no rank's own part of a value."""
    role = getattr(node.meta.get("role"), "role", None)
    return not is_partial(node) and (role is None or role in WHOLE)


def _check(artefact: Artefact, device: str) -> None:
    check_device(device, str(artefact.path), fp8=artefact.manifest.spec.fp8 is not None)


def _limits(artefact: Artefact, device: str) -> Limits:
    if _is_fused(artefact):
        chunk = GPU_PREFILL_CHUNK if device == "cuda" else PREFILL_CHUNK
        return Limits("buffers", chunk, greedy=True)
    # Beside a mask, torch writes down all scores of heads that share a latent vector.
    long = device == "cuda" and artefact.manifest.spec.text.latent is None
    return Limits(prefill_chunk=GPU_PLAIN_CHUNK if long else PREFILL_CHUNK)


ENGINE = torch_with(None)
