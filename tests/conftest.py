import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import benchmarks.torchvision_ops  # noqa: F401  before any test imports transformers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-scout"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """A real trained checkpoint in the released layout."""
    return TINY


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    """Values that transformers computed for `tiny`, in float32; token ids widened to int64."""
    tensors = load_file(TINY / "golden.safetensors")
    return {k: t.long() if t.dtype == torch.int32 else t for k, t in tensors.items()}


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` as a float32 artefact, weights in place."""
    import moec

    out = tmp_path_factory.mktemp("artefacts") / "tiny"
    return moec.export(TINY, precision="fp32", out=out).path
