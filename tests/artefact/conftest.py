from pathlib import Path

import pytest

import moec
from tests.trees import HELD, place


@pytest.fixture(scope="session")
def old(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact to be copied to where a build will replace it; unlike the new one in fp16."""
    out = tmp_path_factory.mktemp("old") / "art"
    return moec.export(sound, precision="fp16", out=out, weights="copy").path


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where artefacts go; holds nothing else."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture(params=HELD)
def out(request: pytest.FixtureRequest, work: Path, old: Path) -> Path:
    """Where an artefact goes."""
    return place(work, old, request.param)
