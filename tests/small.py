"""A model of two layers in which each thing that a graph can hold is there once."""

from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced

_SCOUT = reduced(PRESETS["tiny-scout"], 1, block=64)

#: layer 0: a ring, rotary positions, QK-norm, dense; layer 1: all positions, temperature, experts
SMALL: ModelSpec = _SCOUT.model_copy(
    update={
        "name": "small",
        "text": _SCOUT.text.model_copy(
            update={
                "layers": 2,
                "attention": "LG",
                "rope": "RN",
                "qk_norm": "Q-",
                "temperature": "-T",
                "ffn": "DM",
                "experts": _SCOUT.text.experts.model_copy(update={"count": 2}),
            }
        ),
    }
)
