"""The presets: one spec for each variant of a model, by name."""

from moec.spec.model import ModelSpec
from moec.spec.presets import llama4, others

PRESETS: dict[str, ModelSpec] = {row.name: row for row in (*llama4.ROWS, *others.ROWS)}
