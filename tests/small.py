"""A model of two layers in which each thing that a graph can hold is there once."""

import shutil
from pathlib import Path

from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint

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


def small_with_tokenizer(folder: Path) -> Path:
    """Write a random checkpoint of `SMALL` with the tokenizer of tiny-scout."""
    tiny = Path(__file__).parents[1] / "examples" / "tiny-scout"
    write_random_checkpoint(SMALL, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    return folder
