import io
import json
import os
import shutil
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

import moec
from moec.runtime.bench.torchvision_ops import declare_torchvision_ops
from moec.spec.bounded import limits
from moec.weights.random import write_random_checkpoint
from tests.damage import EMBED, FIRST, INDEX, SECOND, SPEC
from tests.one_thread import one_thread

pytest.register_assert_rewrite("tests.refusals", "tests.trees")  # asserts that say what differs
declare_torchvision_ops()  # before any test imports transformers
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What tests build is recorded in a folder of their own, and not in that of whoever runs them.
_STATE = tempfile.TemporaryDirectory(prefix="moec-state-")
os.environ["XDG_STATE_HOME"] = _STATE.name
if "PYTEST_XDIST_WORKER" in os.environ:
    one_thread()
# Examples are judged by what they compute: on a busy machine one of them may take a second. CI
# draws the same examples each time, so that it fails for the change at hand alone; a developer's
# run draws new ones.
settings.register_profile(
    "moec",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("moec")
ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-scout"

#: seconds that set-up or call of a test without a mark should take at most
FAST = 2.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out tests marked full or slow")
    parser.addoption("--slow", action="store_true", help="run tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests by their marks. `./run check` says --fast, `./run test` says nothing."""
    if config.getoption("--fast"):
        left_out = {"full", "slow"}
    else:
        left_out = set() if config.getoption("--slow") else {"slow"}
    kept, dropped = [], []
    for item in items:
        marked = any(mark.name in left_out for mark in item.iter_markers())
        (dropped if marked else kept).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: Any, request: pytest.FixtureRequest) -> None:
    """Give a fixture the same random numbers alone, in any order and in any process."""
    _seed(f"{request.node.nodeid} {fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Do the same for a test, whatever its fixtures have drawn."""
    _seed(item.nodeid)


def _seed(name: str) -> None:
    torch.manual_seed(zlib.crc32(name.encode()))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Name the tests that made `--fast` wait. Their time depends on the machine: none fails."""
    if not config.getoption("--fast"):
        return
    reports = [each for kind in ("", "passed") for each in terminalreporter.getreports(kind)]
    late = [each for each in reports if each.when != "teardown" and each.duration > FAST]
    for each in sorted(late, key=lambda report: -report.duration):
        terminalreporter.line(
            f"{each.duration:.1f} s: {each.when} of {each.nodeid}: make it fast, or mark it full"
        )


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
    out = tmp_path_factory.mktemp("artefacts") / "tiny"
    return moec.export(TINY, precision="fp32", out=out).path


@pytest.fixture(scope="session")
def tiny_ort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` as a float32 artefact of target ort, weights in place."""
    out = tmp_path_factory.mktemp("artefacts") / "tiny-ort"
    return moec.export(TINY, target="ort", precision="fp32", out=out).path


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two shards and an index, with nothing wrong."""
    folder = tmp_path_factory.mktemp("sound") / "checkpoint"
    write_random_checkpoint(SPEC, folder)
    single = folder / "model.safetensors"
    tensors = load_file(single)
    names = [EMBED, *sorted(set(tensors) - {EMBED})]
    halves = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    for name, half in halves.items():
        save_file({key: tensors[key] for key in half}, folder / name)
    single.unlink()
    weight_map = {key: name for name, half in halves.items() for key in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    """A copy of `sound` that a test may damage; its parent holds nothing else."""
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def built(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact that holds its own weights."""
    return moec.export(sound, out=tmp_path_factory.mktemp("built") / "art", weights="copy").path


@pytest.fixture
def artefact(built: Path, tmp_path: Path) -> Path:
    """A copy of `built` that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "art"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes get one second: those that take all that they get are refused sooner."""
    monkeypatch.setattr(limits, "SECONDS", 1)


def run_command(*args: object) -> tuple[int, str, str]:
    """Run the command line in this process: its exit code, what it prints, what it says on stderr.

    An error that would be a stack trace comes through and fails the test. A process of its own
    would first import torch, for seconds.
    """
    from moec.cli import main

    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    handlers = {number: signal.getsignal(number) for number in numbers}
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            patch.setattr(sys, "argv", ["moec", *map(str, args)])
            main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.getvalue(), err.getvalue()


@pytest.fixture
def cli() -> Callable[..., tuple[int, str]]:
    """Run the command line in this process: its exit code and what it says on stderr."""

    def run(*args: object) -> tuple[int, str]:
        code, _, err = run_command(*args)
        return code, err

    return run
