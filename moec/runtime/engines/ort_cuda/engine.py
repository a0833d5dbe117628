"""The engine of target `ort-cuda`: ONNX Runtime on a GPU, with moec's custom-op library.

The library is native code. A session loads only one that this user compiled here from moec's own
sources, and compiles it if there is none yet (`moec.exporters.ort_library.build`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from moec.artefact.artefact import Artefact, check_graph
from moec.artefact.engine_options import EngineOptions
from moec.exporters.builder import Wanted, builder_for
from moec.exporters.torch.program import part_graph
from moec.kernels.sizes import MOST_BATCH, check_sizes
from moec.runtime.batching import GPU_PREFILL_CHUNK, PREFILL_CHUNK
from moec.runtime.engines.engine import Engine, Limits, Run
from moec.runtime.engines.gpu import check_device, memory_for
from moec.runtime.engines.ort import ort_for, session_of
from moec.runtime.engines.ort_binding import OrtBinding
from moec.runtime.engines.ort_cuda.graphs import OrtGraphs, run_options
from moec.runtime.engines.torch_program import shown
from moec.runtime.engines.weights import load
from moec.spec import names
from moec.spec.errors import refuse


def ort_cuda_engine(
    artefact: Artefact,
    device: str = "cuda",
    taps: Sequence[str] = (),
    part: str = "model",
    given: Sequence[str] = (),
    weights: Mapping[str, Tensor] | None = None,
) -> Run:
    """Open a part of `artefact`, "model" or "vision", in ONNX Runtime on a GPU.

    A call writes into the caches that it is given.

    Args:
        taps: inner values that a call returns besides the outputs.
        given: inner values for which a call gets inputs "NAME.given".
        weights: tensors on the GPU, by name, to use in place of the artefact's, which may be
            missing then.

    Raises:
        MoecError: the artefact has no weights, or the part's file is damaged; or, with exit code 3,
            a GPU, a package or a compiler is missing, the kernels do not support the model's sizes,
            or memory is short.
    """
    _check(artefact, device)
    onnxruntime = ort_for(device)
    from moec.exporters.ort_library.build import own_library
    from moec.exporters.ort_library.operations import operations_for
    from moec.kernels.torch.launch import architecture

    options = onnxruntime.SessionOptions()
    number = torch.cuda.current_device()
    if part == "model":
        here = architecture(torch.device(device, number))
        library = own_library(operations_for(artefact.manifest, taps, given), [here])
        _register(options, library)
    model = ir.to_proto(model_of(artefact, part, taps, given))
    with memory_for(f"weights of {artefact.path}"):
        own = load(artefact, device, part) if weights is None else weights
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    steps = part == "model" and not taps and not given
    chosen = {
        "device_id": str(number),
        "user_compute_stream": str(stream.cuda_stream),
        "enable_cuda_graph": str(int(steps)),
        # Weights leave little memory: take no more than is needed.
        "arena_extend_strategy": "kSameAsRequested",
    }
    providers = [("CUDAExecutionProvider", chosen)]
    session = session_of(artefact, part, model, options, providers)
    wanted = {port.name for port in session.get_inputs()}
    own = {name: each for name, each in own.items() if name in wanted}

    def bound(graph: int) -> OrtBinding:
        return OrtBinding(session, device, own, run_options(onnxruntime, graph), True)

    each = bound(-1)
    graphs = OrtGraphs(bound, each)

    @torch.inference_mode()
    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first = next(iter(feeds))
        with memory_for(f"a call with {first} {list(feeds[first].shape)}"):
            here = {n: x if names.is_total(n) else x.to(device) for n, x in feeds.items()}
            one = steps and here[names.INPUT_IDS].shape[1] == 1
            now = torch.cuda.current_stream()
            stream.wait_stream(now)
            call = graphs if one and names.IMAGE_FEATURES not in here else each
            with torch.cuda.stream(stream):
                results = call(here)
            now.wait_stream(stream)
            for x in results.values():
                if x.is_cuda:
                    x.record_stream(now)
            return results

    return run


def _register(options: Any, library: Path) -> None:
    """Add the custom-op library to a session's options.

    Raises:
        MoecError: this machine cannot load it (exit code 3).
    """
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        refuse(
            library,
            next(iter(str(error).splitlines()), type(error).__name__),
            "a library that this machine can load",
            f"remove {library.parent}; the next session compiles it again",
            exit_code=3,
            cause=error,
        )


def model_of(
    artefact: Artefact, part: str, taps: Sequence[str] = (), given: Sequence[str] = ()
) -> ir.Model:
    """The ONNX model of a part, with weights as inputs, which sessions share.

    It is built from the spec, as it was when the artefact was built. The part's file is checked and
    not run: its nodes could make the kernels, which check no index, read and write anywhere.

    Raises:
        MoecError: the file is not the one that the manifest lists (exit code 1).
    """
    check_graph(artefact, part)
    manifest = artefact.manifest
    wanted = Wanted(
        manifest.spec, manifest.precision, manifest.compute, manifest.dialect, EngineOptions()
    )
    graph = part_graph(manifest.spec, manifest.compute, part, taps, given)
    lowered: ir.Model = builder_for(artefact).lower(wanted, graph, part)[0]
    return lowered


def _check(artefact: Artefact, device: str) -> None:
    if device == "cpu":
        refuse(
            f"{artefact.path} on cpu",
            "an artefact for ONNX Runtime on a GPU",
            "device cuda",
            "add --device cuda; --engine interpreter runs its graph on the cpu, slowly",
            exit_code=3,
        )
    elsewhere = (
        "run it where there is a GPU; --engine interpreter runs its graph on the cpu, slowly"
    )
    check_device(device, str(artefact.path), otherwise=elsewhere)
    check_sizes(artefact.manifest.spec)


def ort_cuda_with(weights: Mapping[str, Tensor] | None) -> Engine:
    """The record of the engine that uses `weights` in place of the decoder's own; None: its own."""

    def opened(
        artefact: Artefact,
        part: str,
        device: str,
        options: str,
        taps: Sequence[str],
        given: Sequence[str] = (),
    ) -> Run:
        own = weights if part == "model" else None
        return ort_cuda_engine(artefact, device, taps, part, given, own)

    return Engine(
        "onnxruntime-cuda",
        "ONNX Runtime with moec's custom-op library",
        opened,
        _check,
        _limits,
        queues=True,
        shown=shown,
        gives=opened,
    )


def _limits(artefact: Artefact, device: str) -> Limits:
    chunk = GPU_PREFILL_CHUNK if device == "cuda" else PREFILL_CHUNK
    return Limits("buffers", chunk, batch=MOST_BATCH)


ENGINE = ort_cuda_with(None)
