import os
import signal
import sys
from collections.abc import Callable, Iterator
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


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Run the command line in this process: its exit code and what it says on stderr.

    An error that would be a stack trace comes through and fails the test.
    """
    from moec.cli import main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["moec", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
