"""A rank fails, or the program that started it: one message says so, and no process is left."""

import gc
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.runtime.ranks import start
from tests.ranks import MARK, ended, marked, wait_until
from tests.refusals import refusal

pytestmark = pytest.mark.full


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Processes that a test starts have this in their environment; none may be left."""
    own = uuid.uuid4().hex
    monkeypatch.setenv(MARK, own)
    yield own
    left = marked(own)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes are left"


@pytest.fixture
def session(art: Path, mark: str) -> Iterator[Any]:
    session: Any = moec.open_session(art, gpus=2)
    yield session
    session.close()


def pids(session: Any) -> list[int]:
    return [process.pid for process in session.ranks._processes]


def fails(call: Callable[[], object], names: str, within: float) -> Any:
    """`call` is refused with exit code 3 and a message that names `names`, in time."""
    before = time.monotonic()
    error = refusal(call, names, code=3)
    assert time.monotonic() - before < within
    return error


def none_is_left(session: Any, mark: str) -> None:
    assert all(map(ended, pids(session))) and not marked(mark)
    assert not session.ranks.alive and not Path(session.ranks._folder.name).exists()
    refusal(lambda: session.logits([[5]]), "processes that have ended")


@pytest.mark.parametrize("index", [0, 1])
def test_a_rank_that_is_killed_ends_the_call(session: Any, mark: str, index: int) -> None:
    steps = []

    def kill(step: list[int | None]) -> None:
        steps.append(step)
        if len(steps) == 3:
            os.kill(pids(session)[index], signal.SIGKILL)

    error = fails(
        lambda: session.generate([[5, 6]], max_new_tokens=2000, stop=(), stream=kill),
        f"rank {index} of 2",
        within=5,
    )
    assert "SIGKILL" in error.found and "memory" in error.found
    none_is_left(session, mark)


def test_a_rank_that_hangs_is_found(
    session: Any, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "SILENCE", 3.0)
    assert session.logits([[5, 6]]).shape == (1, 2, 4096)
    os.kill(pids(session)[1], signal.SIGSTOP)
    error = fails(lambda: session.logits([[5, 6]]), "rank 1 of 2", within=8)
    assert "no sign of life for 3 s" in error.found
    none_is_left(session, mark)


def test_a_slow_stream_is_no_hang(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks sent meanwhile has arrived, although nobody has read it."""
    monkeypatch.setattr(start, "SILENCE", 1.5)
    seen: list[object] = []

    def slow(step: object) -> None:
        seen.append(step)
        if len(seen) == 1:
            time.sleep(3)

    session.generate([[5, 6]], max_new_tokens=40, stop=(), stream=slow)
    assert len(seen) == 40


def test_a_rank_without_memory_says_so(session: Any, mark: str) -> None:
    pid = pids(session)[1]
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (used + (64 << 20), -1))
    with pytest.raises(moec.MoecError) as caught:
        session.logits(torch.full((16, 500), 5))  # of 125 MiB
    assert caught.value.where.startswith("rank 1 of 2: "), caught.value
    assert "memory" in str(caught.value) and len(str(caught.value).splitlines()) == 4
    none_is_left(session, mark)


def test_an_error_in_a_stream_ends_the_ranks(session: Any, mark: str) -> None:
    def broken(step: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.generate([[5, 6]], max_new_tokens=2000, stop=(), stream=broken)
    none_is_left(session, mark)


def test_a_refusal_in_a_stream_ends_the_ranks_too(session: Any, mark: str) -> None:
    """The ranks go on with the call: the next one would get its answer."""

    def refused(step: object) -> None:
        raise moec.MoecError("a stream", "no", "yes", "try again")

    with pytest.raises(moec.MoecError, match="a stream"):
        session.generate([[5, 6]], max_new_tokens=2000, stop=(), stream=refused)
    none_is_left(session, mark)


def test_a_call_within_a_call_is_refused(session: Any, mark: str) -> None:
    with pytest.raises(moec.MoecError, match="a call within a call"):
        session.generate([[5, 6]], stream=lambda step: session.logits([[5]]))
    none_is_left(session, mark)


def test_a_session_that_nobody_has_ends_its_ranks(art: Path, mark: str) -> None:
    session: Any = moec.open_session(art, gpus=2)
    cache = session.new_cache(1, 8)
    assert len(marked(mark)) == 2
    del session, cache
    gc.collect()
    assert not marked(mark)


# ---------------------------------------------------------------- the program that started them


def generating(art: Path, *command: str) -> subprocess.Popen[str]:
    """A process that prints tokens and does not end by itself, in a process group of its own."""
    given = (*command, "generate", art, "--ids", "5,6", "--max-new-tokens", 100000, "--gpus", 2)
    process = subprocess.Popen(
        list(map(str, (sys.executable, "-m", "moec", *given))),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup may run the tests
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.read(8), "a token has come"
    return process


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGHUP], ids=["ctrl-c", "terminal closed"]
)
def test_a_stopped_command_leaves_nothing(
    number: signal.Signals, art: Path, mark: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = generating(art)
    assert len(marked(mark)) == 3
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 2
    note, stopped = err.splitlines()
    assert note.startswith("note: 2 processes") and stopped.startswith("stopped"), err
    assert not marked(mark) and not list(tmp_path.iterdir()), "neither processes nor folders"


def test_ranks_end_without_the_program_that_started_them(
    art: Path, mark: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of which nobody cleans up
    process = generating(art)
    process.kill()
    process.wait()
    wait_until(lambda: not marked(mark), 5)
    process.communicate()
