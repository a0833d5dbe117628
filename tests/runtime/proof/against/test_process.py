"""The process of another engine ends with the one that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from moec.runtime.proof.against import in_process

SCRIPT = """
import os, time
from pathlib import Path

def run(job):
    Path(job["mark"]).write_text(str(os.getpid()))
    time.sleep(600)
"""


def test_another_engine_ends_when_moec_is_killed(tmp_path: Path) -> None:
    script, mark = tmp_path / "engine.py", tmp_path / "mark"
    script.write_text(SCRIPT)
    (tmp_path / "job.json").write_text(f'{{"mark": "{mark}"}}')
    command = [sys.executable, in_process.__file__, script, tmp_path / "job.json", tmp_path / "x"]
    start = (
        "from pathlib import Path; from moec.runtime.proof.against.engines import _wait, OTHERS\n"
        f"_wait({list(map(str, command))}, Path({str(tmp_path / 'log')!r}), "
        "next(iter(OTHERS.values())))"
    )
    moec = subprocess.Popen([sys.executable, "-c", start])
    while not (mark.exists() and mark.read_text()):
        assert moec.poll() is None
        time.sleep(0.05)
    moec.kill()
    moec.wait()
    engine = Path("/proc") / mark.read_text()
    for _ in range(200):
        if not engine.exists() or engine.joinpath("stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(int(mark.read_text()), signal.SIGKILL)
    raise AssertionError("it still runs")
