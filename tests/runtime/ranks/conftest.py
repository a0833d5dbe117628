"""Artefacts that ranks share, built once."""

from pathlib import Path

import pytest

import moec
from moec.weights.random import write_random_checkpoint
from tests.ranks import MAVERICK, UNEVEN


@pytest.fixture(scope="session")
def shared(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artefacts of target torch, by name: tiny-scout, and two models with random weights."""
    folder = tmp_path_factory.mktemp("shared")
    checkpoints = {"tiny-scout": tiny}
    for spec in (MAVERICK, UNEVEN):
        checkpoints[spec.name] = folder / f"{spec.name}-checkpoint"
        write_random_checkpoint(spec, checkpoints[spec.name])
    return {
        name: moec.export(checkpoint, target="torch", out=folder / name).path
        for name, checkpoint in checkpoints.items()
    }


@pytest.fixture(scope="session")
def art(shared: dict[str, Path]) -> Path:
    """tiny-scout's."""
    return shared["tiny-scout"]
