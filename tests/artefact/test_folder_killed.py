"""An artefact appears whole or not at all when the process that writes it is stopped or killed."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import moec
from moec.artefact.artefact import open_artefact
from tests.trees import HELD, assert_whole, names, place, tree

ROOT = Path(__file__).parents[2]

#: the real command line, but progress stops at a stage, says so, and waits for its parent
COMMAND = """
import contextlib, signal, sys
import moec.cli, moec.cli.artefacts

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

moec.cli.artefacts.bar = bar
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


@pytest.mark.full
@pytest.mark.parametrize(
    ("number", "stage", "held"),
    [
        pytest.param(signal.SIGINT, "graph", "nothing", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "copy", "nothing", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "write", "an artefact", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "check", "nothing", marks=pytest.mark.slow),
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


@pytest.mark.full
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


@pytest.mark.slow
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


@pytest.mark.full
@pytest.mark.parametrize("stage", [pytest.param("copy", marks=pytest.mark.slow), "write"])
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
