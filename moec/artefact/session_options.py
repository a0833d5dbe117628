"""Session options for ONNX Runtime, as named sets; an artefact's manifest holds them.

`lean` never copies a weight: weights stay mapped from their files, and a cast runs just before its
result is used. `fast` is ONNX Runtime's default: it folds casts and prepacks weights at load, which
copies the dense weights.

Quantised weights must be prepacked. Otherwise ONNX Runtime dequantises them and multiplies in
float32, which is twenty times as slow. So for quantised weights `lean` prepacks, and only turns off
constant folding and the planned memory arena. A third set, `exact`, does not prepack: a proof uses
its float32 products. docs/performance.md has the figures.
"""

from moec.artefact.manifest import Manifest, SessionOptions
from moec.artefact.targets import find_target

_NO_FOLDING = {"optimization.disable_specified_optimizers": "ConstantFolding"}
_MAPPED = SessionOptions(
    entries={"session.disable_prepacking": "1", **_NO_FOLDING},
    execution_order="PRIORITY_BASED",
    enable_mem_pattern=False,
)
_PREPACKED = SessionOptions(
    entries=_NO_FOLDING, execution_order="PRIORITY_BASED", enable_mem_pattern=False
)


#: the sets that every artefact has, and the one that only artefacts with quantised weights have
SETS, EXACT = ("lean", "fast"), "exact"


#: dequantise as the graph says: onnxruntime 1.30 would fuse FP8 into products that take only int8
_AS_WRITTEN = {"session.disable_quant_qdq": "1"}


def options_of(manifest: Manifest) -> dict[str, SessionOptions]:
    """The sets of session options of an artefact, by name; none if ONNX Runtime does not run it."""
    if "onnxruntime" not in find_target(manifest.target).engines:
        return {}
    integers = any(packing.bits for packing in manifest.packings.values())
    return session_options(integers, bool(manifest.spec.scheme))


def session_options(quantized: bool, dequantizes: bool = False) -> dict[str, SessionOptions]:
    """The same for an artefact of such weights.

    `quantized` says whether its packed weights are int8 or int4, `dequantizes` whether the graph
    dequantises those of the checkpoint, FP8 or 4-bit integers.
    """
    found = dict(zip(SETS, (_PREPACKED if quantized else _MAPPED, SessionOptions()), strict=True))
    if dequantizes and not quantized:
        return {
            name: each.model_copy(update={"entries": {**each.entries, **_AS_WRITTEN}})
            for name, each in found.items()
        }
    return {**found, EXACT: _MAPPED} if quantized else found
