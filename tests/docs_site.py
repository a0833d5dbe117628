"""Build the documentation site into build/site; `./run docs` calls this. A warning is an error."""

import re
import subprocess
import sys
from pathlib import Path

import moec

ROOT = Path(__file__).resolve().parents[1]
#: messages about docstrings, which Zensical prints and does not count as warnings
UNCOUNTED = re.compile(r"^(?:griffe|mkdocstrings)\b.*", re.M)


def build() -> str | None:
    """Build the site; what is wrong with it, or None."""
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    sys.stdout.write(done.stdout)
    if done.returncode:
        return f"zensical ended with exit code {done.returncode}"
    if said := UNCOUNTED.findall(done.stdout):
        return f"{len(said)} messages about docstrings, see above"
    api = (ROOT / "build" / "site" / "api" / "index.html").read_text(encoding="utf-8")
    missing = [name for name in moec.__all__ if f'id="moec.{name}"' not in api]
    return f"the API page lacks {', '.join(missing)}" if missing else None


if __name__ == "__main__":
    sys.exit(build())
