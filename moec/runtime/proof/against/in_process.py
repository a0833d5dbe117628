"""Run the script of another engine: python in_process.py SCRIPT JOB.json FOUND.json.

The script has a function `run`, from a job to what was found. This file and the scripts import
nothing of moec: the engine may live in another environment.
"""

import json
import os
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path


def _end_with_parent() -> None:
    """Wait until the parent is gone, which holds stdin open; then end this process and its own."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Answer the job; what goes wrong is an answer too."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    script, given, taken = map(Path, sys.argv[1:])
    try:
        run = runpy.run_path(str(script))["run"]
        found = run(json.loads(given.read_text(encoding="utf-8")))
    except Exception as error:
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"}
    taken.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
