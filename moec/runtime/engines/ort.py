"""The ONNX Runtime engine: it runs an artefact's ONNX files on the CPU or on CUDA."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.exporters.onnx.lowering import DTYPES
from moec.exporters.onnx.strangers import read_checked, relocate
from moec.exporters.onnx.write import GENAI
from moec.graph_builder.ops import FP8
from moec.runtime.engines.engine import Engine, Limits, Run
from moec.runtime.engines.inner_values import open_values, rename, shown
from moec.runtime.engines.ort_binding import OrtBinding, tensor_of
from moec.spec import names
from moec.spec.errors import refuse

_FOLDER = "session.model_external_initializers_file_folder_path"
#: the first version of onnxruntime that is known to run quantised artefacts; 1.30 refuses them
QUANTIZED_FROM = (1, 32)
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider"]}


def ort_engine(
    artefact: Artefact,
    options_name: str = "lean",
    taps: Sequence[str] = (),
    part: str = "model",
    device: str = "cpu",
    given: Sequence[str] = (),
) -> Run:
    """Open a part of `artefact`, such as "model" or "vision", in ONNX Runtime.

    `options_name` is the name of a set of session options, and `taps` are inner values that a call
    returns besides the outputs. Inputs "NAME.given" stand for the inner values `given`. Caches that
    are buffers are bound, not copied: a call writes into the tensors that it is given.

    Raises:
        MoecError: onnxruntime is not installed (exit code 3), it has no kernels for the artefact's
            precision on `device` (3), it refuses the model (1), or the artefact has no such session
            options or no weights (2).
    """
    manifest = artefact.manifest
    check_kernels(artefact, device)
    onnxruntime = ort_for(device)
    _check_version(artefact, onnxruntime.__version__)
    if options_name not in manifest.presets:
        refuse(
            f"session options {options_name}",
            "no such preset in the artefact's manifest",
            " or ".join(manifest.presets) or "presets: an older version of moec built it",
            "choose one of them" if manifest.presets else "build the artefact again",
        )
    artefact.stored()  # refuses unbound artefacts and changed shards
    model = read_checked(artefact, part)
    root = relocate(artefact, part, model)
    options = onnxruntime.SessionOptions()
    chosen = manifest.presets[options_name].model_dump()
    for key, text in chosen.pop("entries").items():
        options.add_session_config_entry(key, text)
    options.execution_order = getattr(onnxruntime.ExecutionOrder, chosen.pop("execution_order"))
    for key, setting in chosen.items():
        setattr(options, key, setting)
    options.add_session_config_entry(_FOLDER, str(root))
    session = session_of(artefact, part, model, options, _PROVIDERS[device], taps, given)
    if part != GENAI:
        _check_ports(artefact, part, session, {names.given(name) for name in given})
    inputs = {port.name for port in session.get_inputs()}
    optional = {port.name for port in session.get_overridable_initializers()}
    outputs = [port.name for port in session.get_outputs()]

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = inputs | (optional & feeds.keys())
        values = {name: _value(onnxruntime, feeds[name]) for name in given}
        results = session.run_with_ort_values(outputs, values)
        return dict(zip(outputs, map(tensor_of, results), strict=True))

    return OrtBinding(session, device) if manifest.buffered else run


def session_of(
    artefact: Artefact,
    part: str,
    model: onnx.ModelProto,
    options: Any,
    providers: Sequence[Any],
    taps: Sequence[str] = (),
    given: Sequence[str] = (),
) -> Any:
    """An ONNX Runtime session that runs `model`, with inner values opened as in `open_in`.

    Raises:
        MoecError: ONNX Runtime refuses the model (exit code 1).
    """
    import onnxruntime

    # Log nothing: what it says of an error is in the exception, and it would write names from the
    # graph to the terminal as they are.
    options.log_severity_level = 4
    try:
        open_in(model, taps, given)
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers)
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        refuse(
            artefact.graph(part),
            next(iter(str(error).splitlines()), type(error).__name__),
            "a model that ONNX Runtime loads",
            f"moec inspect {artefact.path}",
            exit_code=1,
            cause=error,
        )


def _check_ports(artefact: Artefact, part: str, session: Any, added: set[str]) -> None:
    """Refuse a graph whose inputs and outputs are not those in the manifest.

    `added` are the inputs that were added to it.

    Raises:
        MoecError: names the first (exit code 1).
    """
    ports = artefact.manifest.ports(part)
    given = [*session.get_inputs(), *session.get_overridable_initializers()]
    for wanted, known in ((ports.inputs, given), (ports.outputs, session.get_outputs())):
        here = {each.name: len(each.shape) for each in known}
        named = {each.name: len(each.shape) for each in wanted}
        more = here.keys() - named.keys() - added if wanted is ports.inputs else set()
        for name in (*named, *more):
            if here.get(name) != named.get(name):
                found = "none" if name not in here else f"one of {here[name]} dimensions"
                expected = "none" if name not in named else f"one of {named[name]} dimensions"
                refuse(
                    f"{artefact.graph(part)}: input or output {name}",
                    found,
                    f"{expected}, as the manifest says",
                    "build the artefact again",
                    exit_code=1,
                )


def _value(onnxruntime: Any, tensor: Tensor) -> Any:
    """`tensor` as a value of ONNX Runtime on the CPU, without a copy; numpy lacks FP8."""
    kind = DTYPES[tensor.dtype].value
    if tensor.dtype == FP8:
        tensor = tensor.view(torch.uint8)
    array = tensor.contiguous().numpy()
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)


def ort_for(device: str) -> Any:
    """Import onnxruntime.

    Raises:
        MoecError: onnxruntime is not installed, or has no provider for `device` (exit code 3).
    """
    package, extra = ("onnxruntime-gpu", "cuda") if device == "cuda" else ("onnxruntime", "cpu")
    # From 1.32 on it would write files below the home folder and ask its maker's server. It reads
    # this when it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError:
        refuse(
            "ONNX Runtime",
            "not installed",
            f"{package} 1.30 or newer",
            f"pip install 'moec[{extra}]'",
            exit_code=3,
        )
    providers = onnxruntime.get_available_providers()
    if not set(_PROVIDERS[device]) <= set(providers) or (
        device == "cuda" and not torch.cuda.is_available()
    ):
        refuse(
            f"device {device}",
            f"ONNX Runtime with {', '.join(providers)}"
            + ("" if torch.cuda.is_available() else "; torch finds no GPU"),
            f"{package} and a GPU",
            "use device cpu, or pip install 'moec[cuda]' in place of [cpu]",
            exit_code=3,
        )
    if device == "cuda":
        onnxruntime.preload_dlls()  # load the CUDA libraries that came with torch
    onnxruntime.set_default_logger_severity(4)  # as for a session
    return onnxruntime


def _check_version(artefact: Artefact, version: str) -> None:
    """Refuse quantised experts if this version's QMoE lacks accuracy_level (exit code 3)."""
    quantized = any(packing.bits for packing in artefact.manifest.packings.values())
    if quantized and tuple(map(int, version.split(".")[:2])) < QUANTIZED_FROM:
        refuse(
            artefact.path,
            f"quantised experts, and onnxruntime {version}",
            f"onnxruntime {'.'.join(map(str, QUANTIZED_FROM))} or newer",
            "pip install --upgrade onnxruntime, or build with --precision fp32",
            exit_code=3,
        )


def check_kernels(artefact: Artefact, device: str) -> None:
    """Refuse a graph for which ONNX Runtime has no kernels on `device` (exit code 3)."""
    manifest = artefact.manifest
    if device not in _PROVIDERS:
        expected = " or ".join(_PROVIDERS)
        refuse(f"device {device}", "no such device", expected, "choose one of them")
    runnable = (
        manifest.buffered and manifest.precision in ("fp16", "bf16") and bool(manifest.packings)
        if device == "cuda"
        else manifest.compute != "bf16"
    )
    if not runnable:
        found = f"target {manifest.target}, precision {manifest.precision}, on {device}"
        wanted = (
            "target ort in bf16, or in fp16 with packed weights: attention on CUDA has no others"
            if device == "cuda"
            else "fp32 or fp16: ONNX Runtime has no bf16 kernels on the CPU"
        )
        fix = (
            "build with --target ort --precision fp8 --device cuda, or --precision bf16"
            if device == "cuda"
            else "build with --precision fp32 (weights stay bf16 on disk), or use device cuda"
        )
        refuse(artefact.path, found, wanted, fix, exit_code=3)


def open_in(model: onnx.ModelProto, taps: Sequence[str], given: Sequence[str]) -> None:
    """Open inner values of `model` as `open_values` does, and cast bf16 outputs to float32.

    numpy has no bf16. Caches stay as they are.
    """
    open_values(model, taps, given)
    half, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    narrow = dict[str, str]()
    for output in model.graph.output:
        kind = output.type.tensor_type
        if kind.elem_type == half and not names.is_present(output.name):
            narrow[output.name] = f"{output.name}/bf16"
            kind.elem_type = wide
    rename(model.graph, narrow)
    for name, inner in narrow.items():
        model.graph.node.append(onnx.helper.make_node("Cast", [inner], [name], to=wide))


def _open(
    artefact: Artefact,
    part: str,
    device: str,
    options: str,
    taps: Sequence[str],
    given: Sequence[str] = (),
) -> Run:
    return ort_engine(artefact, options, taps, part, device, given)


def _limits(artefact: Artefact, device: str) -> Limits:
    return Limits("buffers" if artefact.manifest.buffered else "slots")


ENGINE = Engine(
    "onnxruntime", "onnxruntime", _open, check_kernels, _limits, shown=shown, gives=_open
)
