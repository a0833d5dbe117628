"""The memory that this process holds, as Linux counts it; zeros on systems without /proc."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes of a process.

    `anonymous` counts the process's own memory, `mapped` counts pages of files, and `peak` is the
    most that was resident at once. The peak is VmHWM, because `getrusage` keeps the peak of the
    parent process across exec.
    """

    anonymous: int
    mapped: int
    peak: int


def memory() -> Memory:
    """The memory of this process now."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""

    def read(key: str) -> int:
        found = re.search(rf"{key}:\s+(\d+) kB", text)
        return int(found.group(1)) * 1024 if found else 0

    return Memory(read("RssAnon"), read("RssFile"), read("VmHWM"))
