"""moec: a declarative compiler for MoE language models.

Everything public is here, imported on first use.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec.artefact.artefact import Artefact
    from moec.artefact.engine_options import EngineOptions
    from moec.artefact.manifest import Manifest
    from moec.exporters.engines import build_engines, trtexec_commands
    from moec.exporters.export import bind, export
    from moec.exporters.ort_library.build import build_library
    from moec.exporters.quantize import Quantised, quantize
    from moec.graph_builder.parts import build_graph
    from moec.runtime.bench.bench import Timing, bench
    from moec.runtime.cache import Cache
    from moec.runtime.calibrate import calibrate
    from moec.runtime.conversation import Conversation, Reply
    from moec.runtime.inputs.prompt import Prompt, encode
    from moec.runtime.open import open_session
    from moec.runtime.proof.report import Check, Report
    from moec.runtime.proof.validate import validate
    from moec.runtime.session import Session
    from moec.spec.calibration import Calibration
    from moec.spec.errors import MoecError
    from moec.spec.model import ModelSpec
    from moec.spec.plan import Plan, plan
    from moec.spec.scheme import Scheme
    from moec.weights.spec_of import load_spec

__version__ = "0.1.0"

__all__ = [
    "Artefact",
    "Cache",
    "Calibration",
    "Check",
    "Conversation",
    "EngineOptions",
    "Manifest",
    "ModelSpec",
    "MoecError",
    "Plan",
    "Prompt",
    "Quantised",
    "Reply",
    "Report",
    "Scheme",
    "Session",
    "Timing",
    "bench",
    "bind",
    "build_engines",
    "build_graph",
    "build_library",
    "calibrate",
    "encode",
    "export",
    "load_spec",
    "open_session",
    "plan",
    "quantize",
    "trtexec_commands",
    "validate",
]

_HOMES = {
    "Artefact": "moec.artefact.artefact",
    "Cache": "moec.runtime.cache",
    "Calibration": "moec.spec.calibration",
    "Check": "moec.runtime.proof.report",
    "Conversation": "moec.runtime.conversation",
    "EngineOptions": "moec.artefact.engine_options",
    "Manifest": "moec.artefact.manifest",
    "ModelSpec": "moec.spec.model",
    "MoecError": "moec.spec.errors",
    "Plan": "moec.spec.plan",
    "Prompt": "moec.runtime.inputs.prompt",
    "Quantised": "moec.exporters.quantize",
    "Reply": "moec.runtime.conversation",
    "Report": "moec.runtime.proof.report",
    "Scheme": "moec.spec.scheme",
    "Session": "moec.runtime.session",
    "Timing": "moec.runtime.bench.bench",
    "bench": "moec.runtime.bench.bench",
    "bind": "moec.exporters.export",
    "build_engines": "moec.exporters.engines",
    "build_library": "moec.exporters.ort_library.build",
    "build_graph": "moec.graph_builder.parts",
    "calibrate": "moec.runtime.calibrate",
    "encode": "moec.runtime.inputs.prompt",
    "export": "moec.exporters.export",
    "load_spec": "moec.weights.spec_of",
    "open_session": "moec.runtime.open",
    "plan": "moec.spec.plan",
    "quantize": "moec.exporters.quantize",
    "trtexec_commands": "moec.exporters.engines",
    "validate": "moec.runtime.proof.validate",
}


def __getattr__(name: str) -> object:
    """Import torch and onnx on first use: `spec list` should not wait for them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    return _public(found) if isinstance(found, FunctionType) else found


@cache
def _public(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as users call it: what fails outside of moec reaches them as a MoecError."""
    from moec.spec.errors import clear_errors

    public = clear_errors(function)
    public.__module__ = __name__  # where pickle, which sends it to other processes, finds it
    return public


def __dir__() -> list[str]:
    """Name what is public, imported or not, so that editors and `help` find it."""
    return sorted({*globals(), *__all__})
