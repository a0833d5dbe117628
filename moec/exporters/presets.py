"""Session options for ONNX Runtime, by name; an artefact carries them in its manifest.

`lean` never copies a weight: they stay mapped from their files, and casts run next to their use.
`fast` is ONNX Runtime's own default: it folds casts and prepacks at load, which costs copies of
the dense weights. docs/performance.md has the figures.
"""

from moec.exporters.manifest import Preset

PRESETS = {
    "lean": Preset(
        entries={
            "session.disable_prepacking": "1",
            "optimization.disable_specified_optimizers": "ConstantFolding",
        },
        execution_order="PRIORITY_BASED",
        enable_mem_pattern=False,
    ),
    "fast": Preset(),
}
