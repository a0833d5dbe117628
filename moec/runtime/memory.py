"""How much memory the caches of sequences may take, before anything is allocated."""

from pathlib import Path

import torch

from moec.runtime.engines.engine import Layout
from moec.spec.model import ModelSpec

#: the share of free memory that caches may take; the rest is for activations and other programs
SHARE = 0.9
#: of torch's memory on a GPU: what it has got from the driver, and what tensors use of that
_HELD = ("reserved", "allocated")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def slots(kept: int | None, capacity: int) -> int:
    """A cache's slots for `capacity` tokens, of which it keeps at most `kept`; None: all."""
    return capacity if kept is None else min(kept, capacity)


def cache_bytes(
    spec: ModelSpec, element: int, batch: int, capacity: int, layout: Layout = "slots"
) -> int:
    """The memory that caches for `capacity` tokens of `batch` sequences take, in bytes.

    `element` is the bytes of one number. With layout "slots" a call returns new caches, so that
    there are two of each for a moment.
    """
    caches = (each for layer in spec.text.all_layers for each in layer.caches)
    count = sum(slots(each.kept, capacity) * each.width for each in caches)
    return (2 if layout == "slots" else 1) * count * batch * element


def most_tokens(
    spec: ModelSpec, element: int, batch: int, layout: Layout, available: int, most: int
) -> int:
    """The largest capacity, `most` at most, whose caches fit into `available` bytes."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if cache_bytes(spec, element, batch, middle, layout) <= available:
            low = middle
        else:
            high = middle - 1
    return low


def available(device: str) -> int:
    """Bytes of memory that caches on `device` may take; 2^62 where the system does not tell."""
    if device != "cpu":
        free, _ = torch.cuda.mem_get_info()
        stats = torch.cuda.memory_stats_as_nested_dict()  # the flat one costs a prefill 0.6 ms
        reserved, taken = (stats[f"{each}_bytes"]["all"]["current"] for each in _HELD)
        return int((free + reserved - taken) * SHARE)
    found = [1 << 62]
    if _MEMINFO.is_file():
        rows = (line.split() for line in _MEMINFO.read_text().splitlines())
        found += [1024 * int(row[1]) for row in rows if row[0] == "MemAvailable:"]
    limit, used = (_number(_CGROUP / f"memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        found.append(max(0, limit - used))
    return int(min(found) * SHARE)


def _number(path: Path) -> int | None:
    """The number in a file of the kernel; None without a file, or where it says "max"."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
