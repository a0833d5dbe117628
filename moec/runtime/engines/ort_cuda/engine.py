"""The engine of target `ort-cuda`: ONNX Runtime on a GPU, with moec's custom-op library.

The library is native code. A session loads only one that this user compiled here from moec's own
sources, and compiles it if there is none yet (`moec.exporters.ort_library.build`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from moec.artefact.artefact import Artefact, file_of
from moec.artefact.engine_options import EngineOptions
from moec.exporters.builder import Wanted, builder_for
from moec.exporters.onnx.ort_cuda import weights_as_inputs
from moec.exporters.onnx.strangers import load_checked
from moec.exporters.torch.program import part_graph
from moec.runtime.batching import GPU_PREFILL_CHUNK, PREFILL_CHUNK
from moec.runtime.engines.engine import Engine, Limits, Run
from moec.runtime.engines.gpu import check_device, memory_for
from moec.runtime.engines.ort import open_in, ort_for
from moec.runtime.engines.ort_binding import OrtBinding
from moec.runtime.engines.ort_cuda.graphs import OrtGraphs
from moec.runtime.engines.torch_program import shown
from moec.runtime.engines.weights import load
from moec.spec import names
from moec.spec.errors import refuse

#: calls of a session wait for the GPU only where they must
_RUN = {"disable_synchronize_execution_providers": "1"}


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
    from moec.kernels.sizes import check_sizes
    from moec.kernels.torch.launch import architecture

    manifest = artefact.manifest
    check_sizes(manifest.spec)
    with memory_for(f"weights of {artefact.path}"):
        own = load(artefact, device, part) if weights is None else weights
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it says of an error is in the exception
    if part == "model":
        here = architecture(torch.device(device, torch.cuda.current_device()))
        library = own_library(operations_for(manifest, taps, given), [here])
        options.register_custom_ops_library(str(library))
    model = ir.to_proto(model_of(artefact, part, taps, given))
    open_in(model, (), ())
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    steps = part == "model" and not taps and not given
    chosen = {
        "user_compute_stream": str(stream.cuda_stream),
        "enable_cuda_graph": str(int(steps)),
        # Weights leave little memory: take no more than is needed.
        "arena_extend_strategy": "kSameAsRequested",
    }
    providers = [("CUDAExecutionProvider", chosen)]
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers)
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        refuse(
            artefact.graph(part),
            next(iter(str(error).splitlines()), type(error).__name__),
            "a model that ONNX Runtime loads",
            f"moec inspect {artefact.path}",
            exit_code=1,
            cause=error,
        )
    wanted = {port.name for port in session.get_inputs()}
    own = {name: each for name, each in own.items() if name in wanted}

    def run_options(graph: int) -> Any:
        found = onnxruntime.RunOptions()
        for key, value in {**_RUN, "gpu_graph_id": str(graph)}.items():
            found.add_run_config_entry(key, value)
        return found

    each = OrtBinding(session, device, own, run_options(-1), True)
    graphs = OrtGraphs(session, device, own, run_options, each)

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


def model_of(
    artefact: Artefact, part: str, taps: Sequence[str] = (), given: Sequence[str] = ()
) -> ir.Model:
    """The ONNX model of a part: its file, or with `taps` or `given` one from the spec.

    Its weights are inputs, which sessions share and which are read faster than ONNX Runtime does.
    Fused ops hide inner values, so that a graph that shows or takes some is another one.

    Raises:
        MoecError: the file is damaged (exit code 1), or has what moec never writes.
    """
    if not taps and not given:
        _check_file(artefact, part)
        model = load_checked(artefact, part)
        weights_as_inputs(model)
        return model
    manifest = artefact.manifest
    wanted = Wanted(
        manifest.spec, manifest.precision, manifest.compute, manifest.dialect, EngineOptions()
    )
    graph = part_graph(manifest.spec, manifest.compute, part, taps, given)
    lowered: ir.Model = builder_for(artefact).lower(wanted, graph, part)[0]
    return lowered


def _check_file(artefact: Artefact, part: str) -> None:
    """Refuse a part whose file is not the one that the manifest lists."""
    file = artefact.graph(part)
    found, expected = file_of(file), artefact.manifest.files.get(file.name)
    if found != expected:
        refuse(
            file,
            f"sha256 {found.sha256}",
            expected.sha256 if expected else "a file that the manifest lists",
            "build the artefact again",
            exit_code=1,
        )


def _check(artefact: Artefact, device: str) -> None:
    if device == "cpu":
        refuse(
            f"{artefact.path} on cpu",
            "an artefact for ONNX Runtime on a GPU",
            "device cuda",
            "add --device cuda; --engine interpreter runs its graph on the cpu, slowly",
            exit_code=3,
        )
    check_device(device, str(artefact.path))


def _open(
    artefact: Artefact,
    part: str,
    device: str,
    options: str,
    taps: Sequence[str],
    given: Sequence[str] = (),
) -> Run:
    return ort_cuda_engine(artefact, device, taps, part, given)


def ort_cuda_with(weights: Mapping[str, Tensor]) -> Engine:
    """The record of the engine with other `weights` for the decoder than the artefact's."""

    def opened(
        artefact: Artefact, part: str, device: str, options: str, taps: Sequence[str]
    ) -> Run:
        own = weights if part == "model" else None
        return ort_cuda_engine(artefact, device, taps, part, (), own)

    return Engine(ENGINE.name, ENGINE.title, opened, _check, _limits, queues=True)


def _limits(artefact: Artefact, device: str) -> Limits:
    return Limits("buffers", GPU_PREFILL_CHUNK if device == "cuda" else PREFILL_CHUNK)


ENGINE = Engine(
    "onnxruntime-cuda",
    "ONNX Runtime with moec's custom-op library",
    _open,
    _check,
    _limits,
    queues=True,
    shown=shown,
    gives=_open,
)
