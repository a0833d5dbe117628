"""A build that meets an error on its way leaves the disk as it was."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import moec
from moec.artefact.placement import copy_companions
from moec.spec.errors import MoecError
from moec.weights.checkpoint import read_checkpoint
from tests.damage import NO_SPACE, raising
from tests.trees import HELD, assert_whole, names, place, tree

#: stages that run while the folder is being written
STAGES = ("check", "weights", "copy", "write")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (NO_SPACE, MoecError),
        (OSError(errno.EIO, os.strerror(errno.EIO)), MoecError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MoecError),
        (RuntimeError("a defect"), RuntimeError),
    ],
    ids=["disk full", "disk broken", "Ctrl-C", "memory full", "defect"],
)
def test_an_error_while_writing_leaves_the_disk_as_it_was(
    checkpoint: Path, work: Path, out: Path, stage: str,
    error: BaseException, seen: type[BaseException],
) -> None:  # fmt: skip
    before = tree(work)
    with pytest.raises(seen):
        moec.export(checkpoint, out=out, weights="copy", progress=raising(error, stage))
    assert tree(work) == before


def test_a_full_disk_is_said_to_be_full(checkpoint: Path, work: Path) -> None:
    with pytest.raises(MoecError) as caught:
        moec.export(
            checkpoint, out=work / "art", weights="copy", progress=raising(NO_SPACE, "copy")
        )
    assert caught.value.exit_code == 2
    assert str(work / "art") in caught.value.where
    assert "No space left" in caught.value.found


def test_a_companion_that_cannot_be_read_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "processor_config.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(MoecError, match=r"processor_config\.json\n  found:    a Git LFS pointer"):
        copy_companions(read_checkpoint(checkpoint), tmp_path)


def test_folders_made_on_the_way_to_out_go_with_a_failed_build(
    checkpoint: Path, work: Path
) -> None:
    out = work / "by" / "date" / "art"
    with pytest.raises(MoecError):
        moec.export(checkpoint, out=out, weights="copy", progress=raising(NO_SPACE, "copy"))
    assert tree(work) == {}


class Trap:
    """Raises `error` at step `at` of those that change the file system.

    Audit events see the system calls, whichever function makes them. Steps that only remove things
    are left alone: they are the cleaning up.
    """

    armed: "Trap | None" = None

    def __init__(self, error: BaseException, at: int) -> None:
        self.error, self.left, self.event = error, at, ""
        self.thread = threading.get_ident()

    def see(self, event: str, args: tuple[object, ...]) -> None:
        if not (event in ("os.rename", "os.mkdir", "os.link") or opens_to_write(event, args)):
            return
        if str(args[0]).startswith(os.environ["XDG_STATE_HOME"]):
            return  # the build is over
        self.left -= 1
        if self.left < 0 and not self.event:
            self.event = f"{event} {args}"
            raise self.error


def opens_to_write(event: str, args: tuple[object, ...]) -> bool:
    flags = args[2] if event == "open" else 0
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def hook(event: str, args: tuple[object, ...]) -> None:
    trap = Trap.armed
    if trap and trap.thread == threading.get_ident():
        trap.see(event, args)


@pytest.fixture(scope="module")
def trap() -> Callable[[BaseException, int], AbstractContextManager[Trap]]:
    """Sets a trap for the length of a block."""
    sys.addaudithook(hook)  # stays for good, and does nothing while no trap is armed

    @contextmanager
    def setting(error: BaseException, at: int) -> Iterator[Trap]:
        Trap.armed = trap = Trap(error, at)
        try:
            yield trap
        finally:
            Trap.armed = None

    return setting


@pytest.mark.full
@pytest.mark.parametrize(
    "error, held",
    [
        (NO_SPACE, "an artefact"),
        (KeyboardInterrupt(), "nothing"),
        pytest.param(NO_SPACE, "nothing", marks=pytest.mark.slow),
        pytest.param(KeyboardInterrupt(), "an artefact", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_error_at_any_step_leaves_the_disk_as_it_was(
    checkpoint: Path, work: Path, old: Path, error: BaseException, held: str,
    trap: Callable[[BaseException, int], AbstractContextManager[Trap]],
) -> None:  # fmt: skip
    failed = 0
    for step in range(200):
        folder = work / str(step)
        out = place(folder, old, held)
        before = tree(folder)
        with trap(error, step) as sprung:
            try:
                moec.export(checkpoint, out=out, weights="copy")
            except (MoecError, KeyboardInterrupt):
                assert sprung.event, "nothing but the trap is wrong here"
                assert tree(folder) == before, f"step {step}: {sprung.event}"
                failed += 1
            else:  # the build is over, or could do without the step
                assert_whole(out, checkpoint, "fp32")
                assert names(folder) == ["art"], f"step {step}: {sprung.event}"
        if not sprung.event:
            break
    assert failed > 5, "the steps were seen"


def test_an_artefact_survives_a_build_that_is_refused(
    checkpoint: Path, work: Path, old: Path
) -> None:
    art = Path(shutil.copytree(old, work / "art"))
    before = tree(work)
    with pytest.raises(MoecError):
        moec.bind(art, checkpoint, weights="teleport")
    assert tree(work) == before


# ---------------------------------------------------------------- a disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of that many bytes; skips where that is not allowed."""
    point = tmp_path / "disk"
    point.mkdir()
    mounted = False

    def mount(size: int) -> Path:
        nonlocal mounted
        if not shutil.which("mount"):
            pytest.skip("no mount here")
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)]
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted = True
        return point

    yield mount
    if mounted:
        subprocess.run(["umount", str(point)], check=True)


def pages(folder: Path) -> int:
    """Bytes that the files in `folder` take on a disk."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir())


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("percent", [1, 10, 30, 50, 70, 90, 95])
def test_a_disk_too_small_is_refused_and_left_as_it_was(
    checkpoint: Path, old: Path, small_disk: Callable[[int], Path], percent: int, held: str
) -> None:
    taken = pages(old) if held == "an artefact" else 0
    disk = small_disk(taken + pages(old) * percent // 100)
    out = place(disk, old, held)
    before = tree(disk)
    with pytest.raises(MoecError) as caught:
        moec.export(checkpoint, out=out, weights="copy")
    assert caught.value.exit_code == 2 and "No space left" in caught.value.found
    assert tree(disk) == before
