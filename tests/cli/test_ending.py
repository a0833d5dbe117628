"""However a command ends, there is one message on stderr and one exit code."""

import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moec.cli import ending
from moec.cli.output import console
from moec.cli.stopping import EXIT_CODE, Stopped
from tests.conftest import ROOT, run_command
from tests.refusals import one_message

Cli = Callable[..., tuple[int, str]]
MOEC = [sys.executable, "-m", "moec"]


class Broken(io.TextIOWrapper):
    """A stream whose reader has gone or whose disk is full."""

    def __init__(self, number: int) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def _ended(monkeypatch: pytest.MonkeyPatch, line: str, **streams: Any) -> int:
    """The exit code of a command with other streams."""
    from moec.cli import main

    monkeypatch.setattr(sys, "argv", ["moec", *line.split()])
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as ended:
        main()
    for name, stream in streams.items():
        assert getattr(sys, name) is stream, "the command puts the streams back"
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("line", ["spec list", "spec show scout", "plan scout --json", "--help"])
def test_a_full_stdout_ends_with_one_message(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    err = io.StringIO()
    assert _ended(monkeypatch, line, stdout=Broken(errno.ENOSPC), stderr=err) == 2
    one_message(err.getvalue(), "No space left")


@pytest.mark.parametrize("line", ["spec list", "spec show scout", "plan scout --json", "--help"])
def test_a_reader_that_has_gone_ends_quietly(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    err = io.StringIO()
    assert _ended(monkeypatch, line, stdout=Broken(errno.EPIPE), stderr=err) == 1
    assert err.getvalue() == ""


def test_a_stderr_that_fails_changes_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOSPC, errno.EPIPE):
        broken = Broken(number)
        assert _ended(monkeypatch, "plan herd", stdout=io.StringIO(), stderr=broken) == 2
        assert _ended(monkeypatch, "spec diff scout scout", stderr=broken) == 0


@pytest.mark.full
def test_real_streams_that_fail() -> None:
    """In one shell, since each process takes half a second."""
    lines = {
        "spec list >/dev/full": (2, "No space left"),
        "spec list >&-": (2, "closed"),
        "plan herd 2>&-": (2, ""),
        "plan herd 2>/dev/full": (2, ""),
        "spec diff scout scout <&- >/dev/null": (0, ""),
    }
    for line, (code, said) in lines.items():
        script = f"{' '.join(MOEC)} {line}"
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, (line, done.stderr)
        if said:
            one_message(done.stderr, said)
        else:
            assert done.stderr == "", line
    reads, writes = os.pipe()
    os.close(reads)  # as `head` does when it has seen enough
    done = subprocess.run([*MOEC, "spec", "list"], cwd=ROOT, stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, b"")


def test_variables_of_another_program_silence_nothing() -> None:
    """Only commands that ranks run together leave the printing to rank 0."""
    env = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run([*MOEC, "spec", "list"], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0 and b"scout" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_a_character_shows_its_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str
) -> None:
    spec = tmp_path / "spec.yaml"
    named = {**_scout(), "name": "\u4e16\U0001f600"}
    spec.write_text(json.dumps(named, ensure_ascii=False), encoding="utf-8")
    monkeypatch.setattr(console, "_width", 200)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    for line in (f"spec show {spec}", f"plan {spec}", f"spec diff {spec} scout"):
        assert _ended(monkeypatch, line, stdout=out, stderr=err) in (0, 1)
    assert _ended(monkeypatch, "plan \u4e16", stdout=out, stderr=err) == 2
    out.flush(), err.flush()
    assert out.buffer.getvalue().count(rb"\u4e16") >= 1  # type: ignore[attr-defined]
    assert rb"error: \u4e16" in err.buffer.getvalue()  # type: ignore[attr-defined]


def _scout() -> dict[str, Any]:
    code, out, _ = run_command("spec", "show", "tiny-scout", "--format", "json")
    assert code == 0
    return json.loads(out)


def test_a_bug_says_that_it_is_one(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*_: object, **__: object) -> None:
        raise KeyError("a bug\x1b[31m")

    monkeypatch.setattr("moec.spec.plan.plan", plan)
    code, err = cli("plan", "scout")
    one_message(err, "KeyError: 'a bug")
    assert code == 1 and "a bug of moec" in err and "MOEC_DEBUG=1" in err
    monkeypatch.setenv("MOEC_DEBUG", "1")
    code, err = cli("plan", "scout")
    assert code == 1 and "Traceback" in err and "test_ending.py" in err and "\x1b" not in err


def test_what_moec_logs_is_a_note(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*_: object, **__: object) -> None:
        logging.getLogger("moec.kernels").info("it takes a minute\x1b[31m")
        raise MemoryError

    monkeypatch.setattr("moec.spec.plan.plan", plan)
    for _ in range(2):  # once for each command
        _, err = cli("plan", "scout")
        assert err.count("note: it takes a minute\\x1b[31m\n") == 1, err


@pytest.mark.parametrize(
    "failure, code",
    [
        (MemoryError(), 3),
        (RecursionError("maximum recursion depth exceeded"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 3),
        (RuntimeError("CUDA: out of memory"), 3),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_failure_has_the_exit_code_of_its_kind(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, failure: Exception, code: int
) -> None:
    def plan(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("moec.spec.plan.plan", plan)
    found, err = cli("plan", "scout")
    one_message(err, "")
    assert found == code and "a bug of moec" not in err


@pytest.mark.full
def test_paths_of_all_kinds(
    cli: Cli, tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    for line in (
        "inspect loop",
        "plan loop",
        "plan loop/config.json",
        "build --checkpoint loop",
        "build --spec loop",
        "build --variant tiny-scout --no-validate --out loop",
        "build --variant tiny-scout --no-validate --out loop/x",
        "bind BUILT --checkpoint loop",
        "bind BUILT --checkpoint BUILT --out loop",
        "calibrate loop --tokens loop --out x",
        "calibrate BUILT --tokens loop --out loop",
        "validate BUILT --tokens 4 --html loop/x",
        "validate BUILT --eval loop --reference loop",
        "generate BUILT --prompt x --image loop",
        "generate loop --ids 1",
        "bench loop",
        f"inspect {'x' * 5000}",
        f"build --variant tiny-scout --no-validate --out {'x' * 5000}",
    ):
        code, err = cli(*(str(built) if word == "BUILT" else word for word in line.split()))
        one_message(err, "")
        assert code == 2 and "a bug of moec" not in err, line
    for name in ("a\nb\x1b[31m", "\x9b31m\r\u202e", "[/x]", "[bold]", "caf\udce9"):
        code, err = cli("inspect", tmp_path / name)
        one_message(err, "")
        assert code == 2 and err.replace("\n", "").isprintable()


def test_a_folder_that_may_not_be_read(cli: Cli, built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    cli("plan", folder)  # imports what this takes
    folder.chmod(0)
    root = os.geteuid() == 0
    try:
        if root:  # modes do not hold for root
            os.seteuid(65534)
        for line in ("inspect", "plan", "validate"):
            code, err = cli(line, folder)
            one_message(err, "closed")
            assert code == 2 and "a bug of moec" not in err
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o700)


def test_an_out_that_looks_like_markup_is_a_name(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, err = cli("build", "--variant", "tiny-scout", "--no-validate", "--out", "[/x]")
    assert (code, err) == (0, "") and (tmp_path / "[" / "x]" / "manifest.json").is_file()


def test_a_current_folder_that_is_gone(
    cli: Cli, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    code, err = cli("inspect", built)
    one_message(err, "current folder")
    assert code == 2


def test_a_small_or_dumb_terminal(cli: Cli, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(console, "_width", 1)
    for line in (["inspect", built], ["--help"], ["spec", "list"], ["build", "--sparkle"]):
        code, err = cli(*line)
        assert code == (2 if "--sparkle" in line else 0) and "Traceback" not in err


def test_a_command_that_is_none_cannot_steer_the_terminal(cli: Cli) -> None:
    for word in ("\x1b[31m", "--\x1b]0;x\x07", "[/x]", "caf\udce9"):
        code, err = cli(word)
        assert code == 2 and "\x1b" not in err and "\x07" not in err and "Error" in err


STOP = """
import ctypes, os, sys, threading, signal
from moec.cli.stopping import stoppable
mutex = ctypes.create_string_buffer(128)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
with stoppable(0.1, "stopped at once"):
    lock(mutex)  # a call in C that no signal interrupts, as long prefills of ONNX Runtime are
"""


def test_ctrl_c_ends_a_call_that_does_not_return() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOP], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr == "stopped at once\n", done.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["build", "--out", "x"], "no unfinished artefact is left behind"),
        (["quantize", "x"], "no unfinished checkpoint is left behind"),
        (["generate", "x", "--gpus", "2"], "stopped"),
        ([], "stopped"),
    ],
)
def test_a_stopped_command_says_what_it_leaves(
    command: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(ending, "error_line", lambda text, style: lines.append(text))

    def stop() -> None:
        raise Stopped

    assert ending.run(stop, command, ()) == EXIT_CODE
    (line,) = lines
    assert line.startswith("stopped") and said in line
    assert ("--out" in line) == ("unfinished" in line) == (said != "stopped")


@pytest.mark.full
def test_ctrl_c_ends_generate(built: Path) -> None:
    line = [*MOEC, "generate", str(built), "--ids", "1", "--max-new-tokens", "100000"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.read(1), "the first token"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (2, b"stopped\n"), "it writes no artefact to speak of"
