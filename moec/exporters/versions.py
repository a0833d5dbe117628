"""The versions of what makes an artefact, which its manifest and a model card name.

They are for people: nothing that is proven depends on them.
"""

import platform
from importlib.metadata import version

#: the packages whose versions decide what a graph file holds
WRITERS = ("moec", "torch", "onnx-ir")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that build an artefact."""
    packages = ("moec", "torch", "onnx", "onnx-ir", "onnxruntime")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except ImportError:  # moec runs from a checkout, or an optional runtime is missing
            continue
    return found
