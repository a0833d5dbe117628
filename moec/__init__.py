"""moec: a declarative compiler for Llama 4. Everything public is here, imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec.exporters.export import bind, export
    from moec.graph_builder.parts import build_graph
    from moec.runtime.calibrate import calibrate
    from moec.runtime.inputs.prompt import encode
    from moec.runtime.open import open_session
    from moec.runtime.proof.validate import validate
    from moec.spec.errors import MoecError
    from moec.spec.files import load_spec
    from moec.spec.plan import plan

__version__ = "0.1.0"

__all__ = [
    "MoecError",
    "bind",
    "build_graph",
    "calibrate",
    "encode",
    "export",
    "load_spec",
    "open_session",
    "plan",
    "validate",
]

_HOMES = {
    "MoecError": "moec.spec.errors",
    "bind": "moec.exporters.export",
    "build_graph": "moec.graph_builder.parts",
    "calibrate": "moec.runtime.calibrate",
    "encode": "moec.runtime.inputs.prompt",
    "export": "moec.exporters.export",
    "load_spec": "moec.spec.files",
    "open_session": "moec.runtime.open",
    "plan": "moec.spec.plan",
    "validate": "moec.runtime.proof.validate",
}


def __getattr__(name: str) -> Any:
    """Import torch and onnx on first use: `spec list` should not wait for them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(module), attribute or name)
