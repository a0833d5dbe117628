"""What fails outside of moec becomes a message; a bug of moec stays a bug."""

import errno
import os
import pickle
import tempfile
from pathlib import Path

import jinja2
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors import SafetensorError
from tokenizers import Tokenizer

import moec
from moec.spec.errors import MoecError, clear_errors, understood, visible

#: what libraries raise -> (how to make them raise it, exit code)
FAILURES = {
    "no memory": (lambda: torch.zeros(10**15), 3),
    "sizes that overflow": (lambda: torch.zeros(2**62, 2**62), 3),
    "a number of 100 bits": (lambda: torch.zeros(2**100), 2),
    "memory of numpy": (lambda: np.zeros(10**17), 3),
    "a number that no float holds": (lambda: float(10**400), 2),
    "deep data": (lambda: yaml.safe_load("[" * 10**5), 2),
    "bytes that are no text": (lambda: b"\xff".decode(), 2),
    "a lone surrogate": (lambda: "\ud83d".encode(), 2),
    "broken YAML": (lambda: yaml.safe_load("a: ["), 2),
    "a broken template": (lambda: jinja2.Template("{% for"), 2),
    "a broken graph": (lambda: onnxruntime.InferenceSession(b"no graph"), 1),
    "a broken tokenizer": (lambda: Tokenizer.from_str("{}"), 2),
    "a zero byte in a path": (lambda: os.open("a\0b", 0), 2),
    "a missing file": (lambda: os.open("/gone", 0), 2),
    "a missing package": (lambda: __import__("gone"), 3),
}


def test_memory_that_onnxruntime_lacks_is_no_damaged_file() -> None:
    kind = onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException
    error = understood(kind("Failed to allocate memory for requested buffer of size 9"), "here")
    assert error is not None and error.exit_code == 3 and "moec plan" in str(error)


def _raised(call: object) -> BaseException:
    with pytest.raises(Exception) as caught:
        call()  # type: ignore[operator]
    return caught.value


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_of_a_library_has_a_message(case: str) -> None:
    call, code = FAILURES[case]
    error = understood(_raised(call), "here")
    assert error is not None and error.exit_code == code
    assert len(str(error).splitlines()) == 4 and str(error).replace("\n", "").isprintable()


def test_errors_of_the_system_name_the_file_and_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = understood(OSError(errno.ENOSPC, "No space left on device", "out/model.onnx"), "build")
    assert full and full.where == "out/model.onnx" and "make room" in full.next_step
    absent = FileNotFoundError(errno.ENOENT, "No such file or directory")
    other = understood(absent, "build")
    assert other and other.where == "build" and "current folder" not in str(other)
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    gone = understood(absent, "build")
    assert gone and gone.where == "build" and "current folder" in gone.found


def test_folders_for_temporary_files_that_take_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """tempfile says that they do not exist, although a limit or a mode is what it met."""
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/proc/self"])
    error = understood(_raised(tempfile.gettempdir), "moec generate")
    assert error and error.where == "moec generate" and "/proc/self" in error.found
    assert "TMPDIR" in error.next_step and "current folder" not in str(error)


@pytest.mark.parametrize("kind", [KeyError, TypeError, AssertionError, AttributeError, ValueError])
def test_a_bug_is_no_message(kind: type[Exception]) -> None:
    assert understood(kind("x"), "here") is None
    assert understood(ImportError("no name x", name="moec.spec"), "here") is None
    with pytest.raises(kind):
        clear_errors(_raiser(kind("x")))()


def _raiser(error: BaseException):  # type: ignore[no-untyped-def]
    def call() -> None:
        raise error

    return call


def test_a_clear_error_has_the_failure_as_its_cause() -> None:
    failure = SafetensorError("header too large")
    with pytest.raises(MoecError, match="header too large") as caught:
        clear_errors(_raiser(failure))()
    assert caught.value.__cause__ is failure
    own = MoecError("a", "b", "c", "d", 3)
    with pytest.raises(MoecError) as caught:
        clear_errors(_raiser(own))()
    assert caught.value is own
    with pytest.raises(KeyboardInterrupt):
        clear_errors(_raiser(KeyboardInterrupt()))()


def test_an_error_comes_back_whole_from_another_process() -> None:
    back = pickle.loads(pickle.dumps(MoecError("a", "b", "c", "d", 3)))
    assert str(back) == str(MoecError("a", "b", "c", "d", 3)) and back.exit_code == 3


def test_public_functions_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(moec.plan)) is moec.plan
    assert moec.plan is moec.plan and moec.plan.__doc__


def test_the_api_clears_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = _raiser(PermissionError(13, "denied", "spec.yaml"))
    monkeypatch.setattr("moec.weights.spec_of.load_spec", denied)
    with pytest.raises(MoecError, match=r"spec\.yaml") as caught:
        moec.load_spec()  # type: ignore[call-arg]
    assert isinstance(caught.value.__cause__, PermissionError)
    monkeypatch.undo()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for call in (moec.open_session, moec.validate, moec.load_spec, moec.bench):
        with pytest.raises(MoecError):
            call(loop)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain \u00e9 \u4e16 \U0001f600", "plain \u00e9 \u4e16 \U0001f600"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\nc\td\x00\x7f", "a\\rb\\nc\\td\\x00\\x7f"),
        ("\x9b31m \x85", "\\x9b31m \\x85"),
        ("\u202e\u2066\u200f", "\\u202e\\u2066\\u200f"),
        ("\u2028\u2029\ufeff\U000e0041", "\\u2028\\u2029\\ufeff\\U000e0041"),
        ("half \ud83d", "half \\ud83d"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
    ],
)
def test_what_steers_a_terminal_is_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible("a\nb\t\r", keep="\n\t") == "a\nb\t\\r"
