"""Session options for ONNX Runtime, by name; an artefact carries them in its manifest.

`lean` never copies a weight: they stay mapped from their files, and casts run next to their use.
`fast` is ONNX Runtime's own default: it folds casts and prepacks at load, which costs copies of
the dense weights. Quantised weights have to be prepacked, or their products run on dequantised
ones, twenty times as slow: there `lean` is only spared the folding and the pre-planned arena, and a
third set, `exact`, has those slow products, in float32, which is what a proof wants.
docs/performance.md has the figures.
"""

from moec.artefact.manifest import SessionOptions

_NO_FOLDING = {"optimization.disable_specified_optimizers": "ConstantFolding"}
_MAPPED = SessionOptions(
    entries={"session.disable_prepacking": "1", **_NO_FOLDING},
    execution_order="PRIORITY_BASED",
    enable_mem_pattern=False,
)
_PREPACKED = SessionOptions(
    entries=_NO_FOLDING, execution_order="PRIORITY_BASED", enable_mem_pattern=False
)


#: the names that every artefact has, and one of those with quantised weights
SETS, EXACT = ("lean", "fast"), "exact"


#: FP8 is what the graph says: onnxruntime 1.30 joins it with products that take int8 alone
_AS_WRITTEN = {"session.disable_quant_qdq": "1"}


def session_options(quantized: bool, fp8: bool = False) -> dict[str, SessionOptions]:
    """The sets of an artefact by name, for `quantized` integers or not, `fp8` weights or not."""
    found = dict(zip(SETS, (_PREPACKED if quantized else _MAPPED, SessionOptions()), strict=True))
    if fp8:
        return {
            name: each.model_copy(update={"entries": {**each.entries, **_AS_WRITTEN}})
            for name, each in found.items()
        }
    return {**found, EXACT: _MAPPED} if quantized else found
