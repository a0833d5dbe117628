"""The ONNX Runtime engine: an artefact's ONNX files on the CPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from moec.exporters.artefact import Artefact
from moec.runtime.eager import Run
from moec.spec.errors import MoecError

#: Session options by preset. `lean` never copies a weight: they stay mapped from their shards, and
#: casts run next to their use (docs/performance.md has the figures). `fast` is ONNX Runtime's own
#: default: it folds casts and prepacks at load, which costs fp32 copies of the dense weights.
PRESETS: dict[str, dict[str, Any]] = {
    "lean": {
        "entries": {
            "session.disable_prepacking": "1",
            "optimization.disable_specified_optimizers": "ConstantFolding",
        },
        "execution_order": "PRIORITY_BASED",
        "enable_mem_pattern": False,
    },
    "fast": {"entries": {}},
}
_FOLDER = "session.model_external_initializers_file_folder_path"


def ort_engine(
    artefact: Artefact, preset: str = "lean", taps: Sequence[str] = (), part: str = "model"
) -> Run:
    """Open a part of `artefact`, "model" or "vision", in ONNX Runtime.

    `taps` names inner values to return as well.

    Raises:
        MoecError: onnxruntime is not installed (exit code 3), it has no kernels for the artefact's
            precision (3), or it refuses the model (1).
    """
    try:
        import onnxruntime
    except ImportError:
        raise MoecError(
            "ONNX Runtime", "not installed", "onnxruntime 1.30 or newer",
            "pip install 'moec[cpu]'", exit_code=3,
        ) from None  # fmt: skip
    if artefact.manifest.precision == "bf16":
        raise MoecError(
            artefact.path,
            "a graph that computes in bf16",
            "fp32 or fp16: ONNX Runtime has no bf16 kernels on the CPU",
            "build with --precision fp32 (weights stay bf16 on disk)",
            exit_code=3,
        )
    if preset not in PRESETS:
        raise MoecError(
            f"preset {preset}", "no such preset", " or ".join(PRESETS), "choose one of them"
        )
    artefact.entries()  # refuses unbound artefacts and changed shards with a clear message
    options = onnxruntime.SessionOptions()
    chosen = dict(PRESETS[preset])
    for key, text in chosen.pop("entries").items():
        options.add_session_config_entry(key, text)
    for key, setting in chosen.items():
        if key == "execution_order":
            setting = getattr(onnxruntime.ExecutionOrder, setting)
        setattr(options, key, setting)
    options.add_session_config_entry(_FOLDER, str(artefact.weights_folder.resolve()))
    # Errors only: an input that may be left out, image_features, earns a warning at each start.
    options.log_severity_level = 3
    file = artefact.graph(part)
    model: str | bytes = _tapped(file, taps) if taps else str(file)
    try:
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    except Exception as error:  # the bindings raise a dozen unrelated types
        raise MoecError(
            file, str(error).splitlines()[0], "a model that ONNX Runtime loads",
            f"python cli.py inspect {artefact.path}", exit_code=1,
        ) from error  # fmt: skip
    inputs = {port.name for port in session.get_inputs()}
    optional = {port.name for port in session.get_overridable_initializers()}
    outputs = [port.name for port in session.get_outputs()]

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = inputs | (optional & feeds.keys())
        arrays = {name: feeds[name].contiguous().numpy() for name in given}
        return dict(zip(outputs, map(torch.from_numpy, session.run(outputs, arrays)), strict=True))

    return run


def _tapped(file: Path, names: Sequence[str]) -> bytes:
    """The model in `file` with further outputs, in memory; its weights stay where they are."""
    model = ir.load(file)
    known = {each.name: each for node in model.graph for each in node.outputs}
    model.graph.outputs.extend(known[name] for name in names)
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized
