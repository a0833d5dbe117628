"""Start ranks as torchrun does, find what is left of them, and models that they share."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from tests.conftest import ROOT

#: an environment variable by which a test knows the processes that it has started
MARK = "MOEC_TEST_MARK"


def torchrun(count: int, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a Python command in `count` processes, as `torchrun --standalone` does."""
    starts = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count)
    return subprocess.run(
        list(map(str, (sys.executable, *starts, *command))),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def marked(mark: str) -> list[int]:
    """The processes whose environment has `mark`, but for those that have ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def ended(pid: int) -> bool:
    """Whether a process has ended, though its parent may not yet have asked for its code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(done: Callable[[], bool], seconds: float) -> None:
    """Wait until `done` holds, which takes at most `seconds`."""
    start = time.monotonic()
    while not done():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.05)


def maverick(name: str, hidden: int = 16, **text: int) -> ModelSpec:
    """Four layers, dense and MoE in turn, with random weights and no vision tower."""
    small = reduced(PRESETS["maverick"], 4)
    experts = small.text.experts.model_copy(
        update={"count": 5, "hidden": hidden, "shared_hidden": hidden}
    )
    own = small.text.model_copy(update={**text, "experts": experts})
    return small.model_copy(update={"name": name, "text": own, "vision": None})


#: two key/value heads, which four ranks repeat; and sizes of which ranks have unequal parts
MAVERICK = maverick("maverick", heads=8)
UNEVEN = maverick("uneven", hidden=15, heads=6, kv_heads=3, dense_hidden=31, vocab=255)
