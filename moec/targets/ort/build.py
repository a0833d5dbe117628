"""How target `ort` builds: as `onnx`, in dialects of ONNX Runtime, and the folder of genai."""

from dataclasses import replace
from pathlib import Path

from moec.artefact.manifest import Manifest
from moec.exporters.builder import Wanted
from moec.exporters.onnx.genai import write_genai
from moec.exporters.onnx.ort import check_sizes
from moec.spec.errors import refuse
from moec.targets.onnx.build import BUILDER as ONNX

#: bits of the weights, in precisions whose weights alone are narrow
_BITS = {"int8": 8, "int4": 4}


def check(wanted: Wanted) -> None:
    """Refuse what ONNX Runtime's fused operators do not take.

    Raises:
        MoecError: FP8 caches, or sizes that its operators lack.
    """
    scheme = wanted.spec.scheme
    if scheme and scheme.cache:
        refuse(
            f"--target ort with FP8 caches (scheme {scheme.name})",
            "GroupQueryAttention, which has none on a CPU",
            "--cache wide, or --target onnx",
            "add --cache wide",
        )
    check_sizes(wanted.spec, _BITS.get(wanted.precision))


def genai(
    folder: Path, final: Path, manifest: Manifest, weights: Path, checkpoint: Path | None
) -> None:
    """Write what onnxruntime-genai reads, into `folder`/genai, beside its graph."""
    write_genai(folder / "genai", final / "genai", manifest, weights, checkpoint)


BUILDER = replace(
    ONNX,
    dialects=("ort", "ort-packed", "ort-int8", "ort-int4"),
    check=check,
    beside=genai,
)
