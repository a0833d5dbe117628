"""The small model whose artefacts are tampered with."""

from pathlib import Path

import pytest

from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers and four experts."""
    spec = reduced(PRESETS["tiny-scout"], 2, block=64)
    experts = spec.text.experts.model_copy(update={"count": 4})
    text = spec.text.model_copy(update={"experts": experts})
    folder = tmp_path_factory.mktemp("proof") / "checkpoint"
    write_random_checkpoint(spec.model_copy(update={"text": text, "vision": None}), folder)
    return folder
