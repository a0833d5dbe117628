"""Deaths of the building process: each is one refusal, and leaves no half-written engine."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from onnx import TensorProto
from onnx.helper import make_node

from moec.artefact.engine_job import PARTIAL, Job
from moec.exporters.tensorrt import engine
from moec.exporters.tensorrt.engine import build_engine
from moec.spec.errors import MoecError
from tests.exporters.tensorrt_engine.models import SHAPES, attention, job, model, value
from tests.refusals import refusal, refused_and_nothing_left

pytest.importorskip("tensorrt_rtx")
CHILD = "exec {python} -m moec.exporters.tensorrt.process.child"


@pytest.fixture
def wanted(tmp_path: Path) -> Job:
    return job(attention(), tmp_path)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in the child's place; CHILD in it is the child."""

    def put(script: str) -> None:
        script = script.replace("CHILD", CHILD).format(python=sys.executable)
        monkeypatch.setattr(engine, "_COMMAND", ("/bin/sh", "-c", script))

    return put


@pytest.fixture
def half(wanted: Job) -> str:
    """Shell for an engine half written."""
    return f"echo half > '{wanted.engine}{PARTIAL}';"


@pytest.mark.parametrize("name", ["ABRT", "SEGV", "BUS"])
def test_a_crash(
    name: str, wanted: Job, half: str, child: Callable[[str], None], tmp_path: Path
) -> None:
    child(f"{half} echo terminate called >&2; kill -{name} $$")
    error = refusal(lambda: build_engine(wanted), f"SIG{name}", 1)
    assert "terminate called" in error.found
    refused_and_nothing_left(tmp_path, lambda: build_engine(wanted), f"SIG{name}", 1)


def test_a_crash_of_tensorrt_itself(tmp_path: Path) -> None:
    """TensorRT-RTX 1.7 builds no two attentions that share their keys."""
    twin = make_node("Attention", ["q", "k", "v", "m"], ["twin"], name="twin")
    y = value("twin", TensorProto.BFLOAT16, SHAPES["q"])
    wanted = job(attention(extra=[twin], outputs=[y]), tmp_path)
    try:
        build_engine(wanted)
    except MoecError as error:
        assert "it died (SIGSEGV)" in error.found and error.exit_code == 1
        assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    else:
        pytest.skip("this TensorRT-RTX does")


def test_a_library_that_aborts(wanted: Job, tmp_path: Path) -> None:
    """As TensorRT does where a plugin asks for what is not there."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "bad.c", tmp_path / "bad.so"
    source.write_text(
        "#include <stdlib.h>\n__attribute__((constructor)) static void f(void) { abort(); }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    bad = wanted.model_copy(update={"plugins": (str(library),)})
    refused_and_nothing_left(tmp_path, lambda: build_engine(bad), "SIGABRT", 1)


def test_plugins_that_are_none(wanted: Job, tmp_path: Path) -> None:
    bad = wanted.model_copy(update={"plugins": (str(tmp_path / "none.so"),)})
    refused_and_nothing_left(tmp_path, lambda: build_engine(bad), "none.so")


def test_an_error_that_came_before_the_crash_is_what_is_said(
    wanted: Job, child: Callable[[str], None]
) -> None:
    child('echo \'{{"error": "no kernel for x"}}\'; echo chatter >&2; kill -ABRT $$')
    refusal(lambda: build_engine(wanted), "it died (SIGABRT): no kernel for x", 1)


def test_killed_for_want_of_memory(
    wanted: Job, half: str, child: Callable[[str], None], tmp_path: Path
) -> None:
    child(f"{half} printf 'half an event'; kill -KILL $$")
    refused_and_nothing_left(tmp_path, lambda: build_engine(wanted), "out of memory", 1)


def test_memory_that_runs_out(child: Callable[[str], None], tmp_path: Path) -> None:
    shape = (4096, 16384)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=shape, data_location=1)
    weight.external_data.add(key="location", value="w.bin")
    with open(tmp_path / "w.bin", "wb") as file:
        file.truncate(4 * shape[0] * shape[1])  # of zeros, which take no room on the disk
    x, y = (value(n, TensorProto.FLOAT, (4, s)) for n, s in zip("xy", shape, strict=True))
    large = job(model([make_node("MatMul", ["x", "w"], ["y"])], [x], [y], [weight]), tmp_path)
    child("ulimit -v 1200000; CHILD")
    error = refusal(lambda: build_engine(large), "OutOfMemory", 1)
    assert "memory for the model's weights" in error.expected
    assert {each.name for each in tmp_path.iterdir()} == {"model.onnx", "w.bin"}


def test_a_disk_that_is_full(wanted: Job, child: Callable[[str], None], tmp_path: Path) -> None:
    """Of which TensorRT says nothing: it calls the engine built."""
    child("ulimit -f 200; CHILD")
    refused_and_nothing_left(tmp_path, lambda: build_engine(wanted), "model.engine")


def test_a_build_that_takes_too_long(
    wanted: Job, half: str, child: Callable[[str], None], tmp_path: Path
) -> None:
    child(f"{half} sleep 60; true")  # what the child started goes too
    start = time.monotonic()
    refused_and_nothing_left(tmp_path, lambda: build_engine(wanted, timeout=0.3), "0.3 seconds", 1)
    assert time.monotonic() - start < 10


def test_ctrl_c_ends_the_child(
    wanted: Job, half: str, child: Callable[[str], None], listens_to_ctrl_c: None
) -> None:
    # The job is read first: then this process is listening, and no longer starting the child.
    child(f"cat > /dev/null; echo $$ > '{wanted.onnx}.pid'; {half} exec sleep 60")
    main = threading.main_thread().ident
    assert main is not None

    def press() -> None:
        while not Path(wanted.engine + PARTIAL).exists():
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        build_engine(wanted)
    assert not Path(wanted.engine + PARTIAL).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path(f"{wanted.onnx}.pid").read_text()), 0)


@pytest.fixture
def listens_to_ctrl_c() -> Iterator[None]:
    """Where tests were started in the background, the shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_error_of_the_caller_ends_the_child(wanted: Job, tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "build" and total == 1000:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build_engine(wanted, progress)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_a_killed_parent_takes_the_child_along(wanted: Job, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    waits = textwrap.dedent(f"""
        import os, time
        from moec.exporters.tensorrt.process import child
        child._die_with_parent()
        open({str(pid)!r}, "w").write(str(os.getpid()) + "\\n")
        time.sleep(60)
    """)
    parent = textwrap.dedent(f"""
        import sys
        from moec.exporters.tensorrt import engine
        from moec.artefact.engine_job import Job
        engine._COMMAND = (sys.executable, "-c", {waits!r})
        engine.build_engine(Job.model_validate_json({wanted.model_dump_json()!r}))
    """)
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        while not (pid.exists() and pid.read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    for _ in range(100):
        status = Path(f"/proc/{int(pid.read_text())}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")


def test_chatter_is_not_taken_for_events(wanted: Job, child: Callable[[str], None]) -> None:
    child("yes chatter | head -200000 >&2; CHILD")  # more than a pipe holds
    assert build_engine(wanted).size


def test_a_child_that_cannot_start(wanted: Job, child: Callable[[str], None]) -> None:
    child("echo 'No module named moec' >&2; exit 1")
    refusal(lambda: build_engine(wanted), "it died (exit code 1): No module named moec", 1)
