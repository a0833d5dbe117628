"""Run the script of another engine: python in_process.py SCRIPT JOB.json FOUND.json.

The script has a function `run`, from a job to what was found. This file and the scripts import
nothing of moec: the engine may live in another environment.
"""

import json
import runpy
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Answer the job; what goes wrong is an answer too."""
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
