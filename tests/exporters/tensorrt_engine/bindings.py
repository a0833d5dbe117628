"""The Python API of a TensorRT package as JSON, and what our callbacks do when its C++ calls them.

Run as a script, with the name of the package. The bindings of TensorRT proper come without its
libraries, so three empty ones take their places: nothing can be built, but all names, signatures
and callbacks are the real ones.
"""

import ctypes
import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moec.exporters.tensorrt.api import architectures, new_builder, select_architectures
from moec.exporters.tensorrt.callbacks import new_log, new_monitor, new_writer
from moec.spec.errors import MoecError

_LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
_SYMBOLS = """createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL
    createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getPluginRegistry
    getBuilderPluginRegistry getNvOnnxParserVersion initLibNvInferPlugins getInferLibVersion"""
#: what the two packages and pybind11 put before a name
_PREFIX = re.compile(
    r"\b(tensorrt(_rtx)?(_bindings)?\.)+|(nvinfer1|nvonnxparser)::(v_\d_\d::)?"
    r"|\btyping(_extensions)?\.|\bcollections\.abc\."
)
_INTEGER = re.compile(r"\bSupportsInt\b( \| SupportsIndex\b)?")


def _proper() -> Any:
    """The module `tensorrt`, of the bindings alone."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    assert spec and spec.submodule_search_locations
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.c")
        source.write_text(
            "".join(f"void *{name}(void) {{ return 0; }}" for name in _SYMBOLS.split())
        )
        for name in _LIBRARIES:
            library = os.path.join(folder, name)
            command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", library, source]
            subprocess.run(command, check=True)
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        file = Path(next(iter(spec.submodule_search_locations)), "tensorrt.so")
        found = importlib.util.spec_from_file_location("tensorrt", file)
        assert found and found.loader
        module = importlib.util.module_from_spec(found)
        sys.modules["tensorrt"] = module
        found.loader.exec_module(module)
    module.__dict__.setdefault("__version__", "11.4")
    return module


def _signature(function: Any) -> str:
    """ "(a: T, b: U) -> V", the overloads one after the other; without self and packages."""
    lines = [line.strip() for line in (function.__doc__ or "").splitlines()]
    found = [
        re.sub(r"^\d+\. ", "", each) for each in lines if re.match(r"(\d+\. )?\w*\(.*->", each)
    ]
    if len(found) > 1:
        found = [each for each in found if "*args" not in each]
    texts = [_INTEGER.sub("int", _PREFIX.sub("", each[each.index("(") :])) for each in found]
    return " | ".join(re.sub(r"^\((self|arg0): \w+(, /)?(, )?", "(", text) for text in texts)


def _member(value: Any) -> str:
    if isinstance(value, property):
        kind = _signature(value.fget).removeprefix("() -> ")
        return f"{kind}, settable" if value.fset else kind
    return _signature(value) if callable(value) else "value"


def api(module: Any) -> dict[str, dict[str, str]]:
    """Class -> member -> signature; what is no class is of class "module"."""
    found: dict[str, dict[str, str]] = {"module": {}}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if not inspect.isclass(value):
            found["module"][name] = _member(value)
            continue
        found["module"][name] = _signature(value.__init__) or "class"
        members = [each for each in dir(value) if not each.startswith("_")]
        found[name] = {each: _member(inspect.getattr_static(value, each)) for each in members}
    return found


def callbacks(module: Any) -> dict[str, Any]:
    """What our callbacks make of calls from C++."""
    told: list[str] = []
    log = new_log(module, told.append)
    for severity in (module.ILogger.ERROR, module.ILogger.WARNING, module.ILogger.INFO):
        module.ILogger.log(log, severity, str(severity))
    steps: list[tuple[int, int]] = []
    monitor = new_monitor(module, lambda done, total: steps.append((done, total)))
    base = module.IProgressMonitor
    base.phase_start(monitor, "all", None, 2)
    base.phase_start(monitor, "half", "all", 4)
    goes_on = [base.step_complete(monitor, "half", step) for step in range(4)]
    base.phase_finish(monitor, "half")
    base.step_complete(monitor, "all", 0)
    base.step_complete(monitor, "all", 1)
    file = io.BytesIO()
    writer = new_writer(module, file)
    data = ctypes.create_string_buffer(b"engine", 6)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = new_capsule(ctypes.addressof(data), None, None)
    written = module.IStreamWriter.write(writer, capsule, 6)
    return {
        "errors": len(log.errors),
        "warnings": len(log.warnings),
        "told": len(told),
        "goes_on": goes_on,
        "steps": steps,
        "written": [written, writer.size, file.getvalue().decode()],
        "architectures": architectures(module),
    }


def refusals(module: Any) -> dict[str, Any]:
    """What is said where there is no GPU, and where architectures cannot be chosen."""
    found: dict[str, Any] = {}
    log = new_log(module, lambda text: None)
    for name, call in (
        ("builder", lambda: new_builder(module, log)),
        ("aim", lambda: select_architectures(module, object(), ("SM89",))),
        ("here", lambda: select_architectures(module, object(), ())),
    ):
        try:
            call()
            found[name] = None
        except MoecError as error:
            found[name] = [error.exit_code, str(error)]
    return found


if __name__ == "__main__":
    import importlib

    proper = sys.argv[1] == "tensorrt"
    trt = _proper() if proper else importlib.import_module(sys.argv[1])
    result = {"api": api(trt), "callbacks": callbacks(trt)}
    print(json.dumps(result | ({"refusals": refusals(trt)} if proper else {})), flush=True)
    os._exit(0)
