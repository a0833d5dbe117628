"""How target `ort` builds: like `onnx`, with ONNX Runtime's dialects and a folder for genai."""

from dataclasses import replace
from pathlib import Path

from moec.artefact.manifest import Manifest
from moec.exporters.builder import Companion, Wanted
from moec.exporters.onnx.genai import FOLDER, write_genai
from moec.exporters.onnx.int4.ort import check_int4
from moec.exporters.onnx.ort import check_sizes
from moec.graph_builder.passes.buffers import has_buffers
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.targets.onnx.build import BUILDER as ONNX

#: bits of a weight, in the precisions that quantise weights only
_BITS = {"int8": 8, "int4": 4}


def check(wanted: Wanted) -> None:
    """Refuse a model that ONNX Runtime's operators do not support.

    Raises:
        MoecError: the model has FP8 caches, or sizes or 4-bit integers that the operators do not
            take.
    """
    scheme = wanted.spec.scheme
    if scheme and scheme.cache:
        refuse(
            f"--target ort with FP8 caches (scheme {scheme.name})",
            "GroupQueryAttention, which has none on a CPU",
            "--cache wide, or --target onnx",
            "add --cache wide",
        )
    own = scheme and scheme.int4  # the integers of the checkpoint have groups of their own
    check_sizes(wanted.spec, None if own else _BITS.get(wanted.precision))
    check_int4(wanted.spec)


def dialect(chosen: str, spec: ModelSpec) -> str:
    """The dialect for a checkpoint's own 4-bit integers, if it has any; else `chosen`."""
    return "ort-given" if spec.scheme and spec.scheme.int4 else chosen


def genai(folder: Path, final: Path, manifest: Manifest, companion: Companion) -> None:
    """Write the files that onnxruntime-genai reads into `folder`/genai, if it can run the model."""
    if has_buffers(manifest.spec.text):
        write_genai(folder / FOLDER, final / FOLDER, manifest, companion)


BUILDER = replace(
    ONNX,
    dialects=("ort", "ort-packed", "ort-int8", "ort-int4", "ort-given"),
    check=check,
    dialect=dialect,
    beside=genai,
    weights=FOLDER,
)
