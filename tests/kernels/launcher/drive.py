"""Runs in a process whose libcuda.so.1 is the fake one: the launcher for numbers of tokens.

    drive.py LIBRARY PROGRAM TOKENS...

Prints a line of JSON: where memory is, for each number of tokens the workspace; or what it said.
With "break" in place of numbers it opens programs with bytes that are wrong.
"""

import ctypes
import json
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.kernels.launcher import expected
from tests.kernels.launcher.expected import SIZES
from tests.kernels.launcher.launcher import Launcher, LaunchError
from tests.kernels.launcher.reader import read

STREAM, WORKSPACE, GIVEN = 0x57000, 0x10_0000_0010, 0x20_0000_0000


def main() -> None:
    library, file, *counts = sys.argv[1:]
    program = Path(file).read_bytes()
    if counts == ["break"]:
        print(json.dumps(damaged(Path(library), program)))
        return
    launcher = Launcher(Path(library), program)
    found = read(program)
    given = [GIVEN + (i << 32) for i in range(len(found.given))]
    if "misplaced" in counts:
        given[1] += 2
    rooms = {}
    for tokens in map(int, (each for each in counts if each.isdigit())):
        if "FAKE_LOG" in os.environ:
            expect(found.most, tokens)
        rooms[tokens] = launcher.workspace(tokens)
        room = rooms[tokens] - ("small" in counts)
        try:
            if "prepare" in counts:
                with ThreadPoolExecutor(8) as threads:
                    list(threads.map(lambda _: launcher.prepare(), range(8)))
            launcher.run(tokens, given, WORKSPACE, room, STREAM)
        except LaunchError as error:
            print(json.dumps({"failed": str(error)}))
            return
    launcher.close()
    print(json.dumps({"at": launcher.at, "given": given, "rooms": rooms}))


def expect(most: int, tokens: int) -> None:
    """Tell the fake how many bytes the parameters of each launch have."""
    fake = ctypes.CDLL("libcuda.so.1")
    architecture = int(os.environ["FAKE_CC"])
    while tokens > 0:
        part = min(tokens, most)
        launches, buffers = expected.launches(SIZES[0], part, architecture)
        for each in launches:
            made = expected.compiled(each, architecture)
            values = expected.values(made, SIZES[0], part, buffers)
            widths = [each[1] if each[0] == "number" else 8 for each in values]
            widths += [8, 8]
            fake.fake_expect(len(widths), (ctypes.c_int * len(widths))(*widths))
        tokens -= part


def damaged(library: Path, program: bytes) -> list[str]:
    """What is said of programs that are not whole; of some it may say nothing, none may end it."""
    whole = b"", program[:63], b"x" + program[1:], program[:-64], b"moecprog" + bytes(56)
    said = [opened(library, each) for each in whole]
    count = int.from_bytes(program[48:56], "little")
    chance = random.Random(7)
    for _ in range(400):
        bytes_ = bytearray(program)
        for _ in range(chance.choice((1, 3))):
            at = 64 + 8 * chance.randrange(count)
            bytes_[at : at + 8] = chance.choice(
                (chance.randbytes(8), (2**62).to_bytes(8, "little"), b"\xff" * 8)
            )
        opened(library, bytes(bytes_))
    return said


def opened(library: Path, program: bytes) -> str:
    try:
        found = Launcher(library, program)
    except LaunchError as error:
        return str(error)
    found.close()
    return ""


if __name__ == "__main__":
    main()
