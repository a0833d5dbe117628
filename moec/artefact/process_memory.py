"""What this process holds in memory, by Linux's own count; zeros where there is no /proc."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes: `anonymous` is the process's own, `mapped` pages of files, `peak` the most.

    `getrusage` would count a parent's peak as ours: it survives exec, VmHWM does not.
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
