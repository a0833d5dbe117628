"""An artefact appears whole or not at all, whatever happens to the build that writes it."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import moec
from moec.exporters.artefact import open_artefact, verify_files
from moec.spec.errors import MoecError
from moec.spec.presets import PRESETS
from moec.spec.twin import twin
from moec.weights.random import write_random_checkpoint

ROOT = Path(__file__).parents[2]
SPEC = twin(PRESETS["tiny-scout"])
#: stages that run while the folder is being written
STAGES = ("check", "weights", "copy", "write")
#: what `out` holds before the build
HELD = ("nothing", "an artefact")
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tree(folder: Path) -> dict[str, str]:
    """Everything below `folder`, hidden files too, with what it holds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards and an index."""
    folder = tmp_path_factory.mktemp("source") / "checkpoint"
    write_random_checkpoint(SPEC, folder)
    single = folder / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    weight_map = {}
    for index, half in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in half}, folder / f"{index}.safetensors")
        weight_map |= dict.fromkeys(half, f"{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def old(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact to be copied to where a build will replace it; unlike the new one in fp16."""
    out = tmp_path_factory.mktemp("old") / "art"
    return moec.export(checkpoint, precision="fp16", out=out, weights="copy").path


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where artefacts go; holds nothing else."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def place(folder: Path, old: Path, held: str) -> Path:
    """Where an artefact goes, in `folder`: free, or taken by the old artefact."""
    folder.mkdir(exist_ok=True)
    if held == "an artefact":
        shutil.copytree(old, folder / "art")
    return folder / "art"


@pytest.fixture(params=HELD)
def out(request: pytest.FixtureRequest, work: Path, old: Path) -> Path:
    """Where an artefact goes."""
    return place(work, old, request.param)


def names(folder: Path) -> list[str]:
    """What lies in `folder`, hidden things too."""
    return sorted(path.name for path in folder.iterdir())


def assert_whole(art: Path, checkpoint: Path, precision: str | None = None) -> None:
    """`art` opens, every byte is as it was written, and its weights are the checkpoint's."""
    artefact = open_artefact(art)
    verify_files(artefact)
    assert precision is None or artefact.manifest.precision == precision
    for name in artefact.manifest.weights.shards:
        assert (art / name).read_bytes() == (checkpoint / name).read_bytes()
    known = {"manifest.json", *artefact.manifest.files, *artefact.manifest.weights.shards}
    assert set(tree(art)) == known, "nothing that the manifest does not know"


def raising(error: BaseException, stage: str) -> Callable[[str, int, int], None]:
    """A progress callback that raises `error` when `stage` begins."""

    def progress(name: str, done: int, total: int) -> None:
        if name.split()[0] == stage:
            raise error

    return progress


# ---------------------------------------------------------------- errors on the way


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (NO_SPACE, MoecError),
        (OSError(errno.EIO, os.strerror(errno.EIO)), MoecError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
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


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize(
    "error", [NO_SPACE, KeyboardInterrupt()], ids=lambda error: type(error).__name__
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


# ---------------------------------------------------------------- replacing


@pytest.mark.parametrize("weights", ["in-place", "link", "copy"])
def test_a_build_replaces_an_artefact_and_nothing_of_the_old_one_stays(
    checkpoint: Path, work: Path, old: Path, weights: str
) -> None:
    art = Path(shutil.copytree(old, work / "art"))
    moec.export(checkpoint, precision="fp32", out=art, weights=weights)
    assert names(work) == ["art"]
    manifest = open_artefact(art).manifest
    assert (manifest.precision, manifest.weights.mode) == ("fp32", weights)
    shards = set() if weights == "in-place" else set(manifest.weights.shards)
    assert set(tree(art)) == {"manifest.json", *manifest.files, *shards}


def test_an_empty_folder_is_taken(checkpoint: Path, work: Path) -> None:
    (work / "art").mkdir()
    moec.export(checkpoint, out=work / "art", weights="copy")
    assert_whole(work / "art", checkpoint)


def test_folders_on_the_way_to_out_are_made(checkpoint: Path, work: Path) -> None:
    moec.export(checkpoint, out=work / "by" / "date" / "art", weights="copy")
    assert_whole(work / "by" / "date" / "art", checkpoint)


def test_the_folder_one_stands_in_can_be_out(
    checkpoint: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "art").mkdir()
    monkeypatch.chdir(work / "art")
    moec.export(checkpoint, out=".", weights="copy")
    assert_whole(work / "art", checkpoint)


# ---------------------------------------------------------------- leftovers


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["partial", "replaced"])
@pytest.mark.parametrize("name", ["art", "art[1]", "art 17B", "*", "art.v2"])
def test_leftovers_of_dead_processes_are_removed(
    checkpoint: Path, work: Path, old: Path, dead: int, name: str, kind: str
) -> None:
    shutil.copytree(old, work / name)
    leftover = work / f".{name}.moec-{kind}-{dead}"
    (leftover / "sub").mkdir(parents=True)
    (leftover / "sub" / "model.onnx").write_text("half")
    moec.export(checkpoint, out=work / name, weights="copy")
    assert names(work) == [name]
    assert_whole(work / name, checkpoint, "fp32")


def test_an_artefact_that_a_killed_build_had_moved_away_comes_back(
    checkpoint: Path, work: Path, old: Path, dead: int
) -> None:
    shutil.copytree(old, work / f".art.moec-replaced-{dead}")
    with pytest.raises(MoecError):
        moec.export(
            checkpoint, out=work / "art", weights="copy", progress=raising(NO_SPACE, "copy")
        )
    assert names(work) == ["art"]
    assert tree(work / "art") == tree(old)


def test_half_of_an_artefact_that_a_killed_build_was_removing_does_not_come_back(
    checkpoint: Path, work: Path, dead: int
) -> None:
    """`out` itself was removed by hand since."""
    leftover = work / f".art.moec-replaced-{dead}"
    leftover.mkdir()
    (leftover / "model.onnx").write_text("half")
    moec.export(checkpoint, out=work / "art", weights="copy")
    assert names(work) == ["art"]
    assert_whole(work / "art", checkpoint)


@pytest.mark.parametrize("kind", ["partial", "replaced"])
def test_leftovers_of_a_dead_process_of_our_own_id_are_removed(
    checkpoint: Path, work: Path, out: Path, kind: str
) -> None:
    """In containers every build may have the same process id."""
    leftover = work / f".art.moec-{kind}-{os.getpid()}"
    leftover.mkdir()
    (leftover / "model.onnx").write_text("half")
    moec.export(checkpoint, out=out, weights="copy")
    assert names(work) == ["art"]
    assert_whole(out, checkpoint, "fp32")


@pytest.mark.parametrize(
    "name",
    [
        f".art.moec-partial-{os.getppid()}",  # of a process that lives
        ".art2.moec-partial-DEAD",  # of another artefact
        ".art.moec-partial-mine",  # of nobody
        ".art.v2",
        "art.moec-partial-DEAD",
    ],
)
def test_what_is_no_leftover_is_left_alone(
    checkpoint: Path, work: Path, dead: int, name: str
) -> None:
    kept = work / name.replace("DEAD", str(dead))
    kept.mkdir()
    (kept / "file").write_text("mine")
    moec.export(checkpoint, out=work / "art", weights="copy")
    assert (kept / "file").read_text() == "mine"


def test_leftovers_are_not_found_by_a_name_that_is_a_pattern(
    checkpoint: Path, work: Path, dead: int
) -> None:
    kept = work / f".art1.moec-partial-{dead}"
    kept.mkdir()
    moec.export(checkpoint, out=work / "art[1]", weights="copy")
    assert kept.exists(), "it is art1's to remove, not art[1]'s"


# ---------------------------------------------------------------- signals

#: the real command line, but progress stops at a stage, says so, and waits for its parent
COMMAND = """
import contextlib, signal, sys
import moec.cli, moec.show

stage = sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # also below a shell that ignores it

@contextlib.contextmanager
def bar(*args, **kwargs):
    waited = []

    def progress(name, done, total):
        if name.split()[0] == stage and not waited:
            waited.append(name)
            print("reached", flush=True)
            sys.stdin.readline()

    yield progress

moec.show.bar = bar
moec.cli.main()
"""


@contextmanager
def stopped_at(stage: str, checkpoint: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A build of `out` in a process of its own that has come to `stage` and waits there."""
    command = [sys.executable, "-c", COMMAND, stage, "build", "--no-validate", "--weights", "copy"]
    process = subprocess.Popen(
        [*command, "--checkpoint", str(checkpoint), "--out", str(out)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout and process.stdout.readline() == "reached\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "stage", "held"),
    [
        (signal.SIGINT, "graph", "nothing"),
        (signal.SIGINT, "copy", "nothing"),
        (signal.SIGINT, "write", "an artefact"),
        (signal.SIGTERM, "check", "nothing"),
        (signal.SIGTERM, "copy", "an artefact"),
    ],
)
def test_a_build_that_is_stopped_says_so_and_leaves_nothing(
    checkpoint: Path, work: Path, old: Path, number: signal.Signals, stage: str, held: str
) -> None:
    out = place(work, old, held)
    before = tree(work)
    with stopped_at(stage, checkpoint, out) as process:
        if stage != "graph":
            assert tree(work) != before, "the build was in the middle of writing"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert tree(work) == before
    assert "stopped" in err and "Traceback" not in err
    assert process.returncode == 2


def test_two_builds_of_one_out_leave_one_whole_artefact(checkpoint: Path, work: Path) -> None:
    with stopped_at("copy", checkpoint, work / "art") as process:
        moec.export(checkpoint, precision="fp16", out=work / "art", weights="copy")
        assert_whole(work / "art", checkpoint, "fp16")
        process.communicate("go on\n", timeout=60)
    assert process.returncode == 0
    assert_whole(work / "art", checkpoint, "fp32")
    assert names(work) == ["art"]


#: builds work/0/art, work/1/art, ... each in a forked process that kills itself one file-system
#: step later than the one before; the last one lives to the end
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import moec

checkpoint, work, old = map(Path, sys.argv[1:])
CHANGES = ("os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "shutil.rmtree")
moec.export(checkpoint, out=work / "warm", weights="copy")  # imports all there is
shutil.rmtree(work / "warm")

def build(out, left):
    def hook(event, args):
        nonlocal left
        flags = args[2] if event == "open" else 0
        if event in CHANGES or isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    moec.export(checkpoint, precision="fp32", out=out, weights="copy")

for step in range(200):
    folder = work / str(step)
    folder.mkdir()
    if old.is_dir():
        shutil.copytree(old, folder / "art")
    child = os.fork()
    if not child:
        status = 1
        try:
            build(folder / "art", step)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
sys.exit("the build never came to its end")
"""


@pytest.mark.parametrize("held", HELD)
def test_a_build_killed_at_any_step_leaves_no_half_artefact_and_the_next_one_cleans_up(
    checkpoint: Path, work: Path, old: Path, held: str
) -> None:
    before = old if held == "an artefact" else work / "none"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(checkpoint), str(work), str(before)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folders = sorted(work.iterdir(), key=lambda path: int(path.name))
    left_over, seen = 0, []
    for folder in folders:
        art = folder / "art"
        if art.exists():
            assert_whole(art, checkpoint)
        seen.append(open_artefact(art).manifest.precision if art.exists() else "none")
        left_over += names(folder) not in ([], ["art"])
        moec.export(checkpoint, precision="bf16", out=art, weights="copy")
        assert_whole(art, checkpoint, "bf16")
        assert names(folder) == ["art"], f"step {folder.name}"
    assert left_over > 5, "builds were killed in the middle"
    assert (seen[0], seen[-1]) == ("fp16" if held == "an artefact" else "none", "fp32")


@pytest.mark.parametrize("stage", ["copy", "write"])
def test_a_killed_command_leaves_what_the_next_build_removes(
    checkpoint: Path, work: Path, stage: str
) -> None:
    with stopped_at(stage, checkpoint, work / "art") as process:
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (work / "art").exists()
    assert len(list(work.iterdir())) == 1, "the leftover that this is about"
    moec.export(checkpoint, out=work / "art", weights="copy")
    assert_whole(work / "art", checkpoint)
    assert names(work) == ["art"]
