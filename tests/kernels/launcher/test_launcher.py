"""The launcher against a driver that writes down what it is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moec.kernels.ahead_of_time.operations import moe_layer
from moec.kernels.ahead_of_time.program import build_program
from moec.kernels.launches.launch import SHARED
from tests.kernels.launcher import expected
from tests.kernels.launcher.conftest import HERE
from tests.kernels.launcher.drive import STREAM, WORKSPACE
from tests.kernels.launcher.expected import MOST, SIZES
from tests.kernels.launcher.reader import read

pytestmark = pytest.mark.full

ROOT = HERE.parents[2]
EARLY = [[6, 1]]  # programmatic stream serialization, allowed


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of an MoE layer as a file."""
    file = tmp_path_factory.mktemp("program") / "program.bin"
    file.write_bytes(build_program(moe_layer(SIZES[0], MOST), tuple(SHARED)))
    return file


def drive(driver: Path, *arguments: object, **given: object) -> Any:
    done = subprocess.run(
        [sys.executable, HERE / "drive.py", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(driver)}
        | {name: str(each) for name, each in given.items()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", SHARED)
def test_what_is_launched(
    launcher: Path, program: Path, fake: Path, tmp_path: Path, architecture: int
) -> None:
    counts = [1, 2, 7, 16, 33, 64, 65, 200, MOST, MOST + 70]
    log = tmp_path / "log"
    found = drive(fake, launcher, program, *counts, FAKE_LOG=log, FAKE_CC=architecture)
    said = [json.loads(line) for line in log.read_text().splitlines()]
    maps = {each["map"]: each for each in said if "map" in each}
    launches = iter([each for each in said if "launch" in each])
    sizes = SIZES[0]
    for tokens in counts:
        room = found["rooms"][str(tokens)]
        for first in range(0, tokens, MOST):
            part = min(MOST, tokens - first)
            follows = first > 0
            names = [each.name for each in read(program.read_bytes()).given]
            given = dict(zip(names, found["given"], strict=True))
            given["x"] += first * 2 * sizes.dim
            given["out"] += first * 2 * sizes.dim
            check(launches, maps, architecture, part, given, found["at"], program, room, follows)
    assert next(launches, None) is None
    loaded = [each["load"] for each in said if "load" in each]
    assert len(loaded) == len(set(loaded)) > 5


def check(
    launches: Any, maps: dict[int, Any], architecture: int, tokens: int, given: dict[str, int],
    at: int, program: Path, room: int, follows: bool,
) -> None:  # fmt: skip
    wanted, buffers = expected.launches(SIZES[0], tokens, architecture)
    content = program.read_bytes()
    places = dict(given)
    for i, each in enumerate(wanted):
        found, made = next(launches), expected.compiled(each, architecture)
        assert found["launch"] == made.name
        start = found["image"] - at
        assert content[start : start + len(made.cubin)] == made.cubin
        assert tuple(found["grid"]) == each.grid
        assert found["block"] == [made.block, 1, 1]
        assert (found["shared"], found["stream"]) == (made.shared, STREAM)
        assert found["asked"] == (made.shared if made.shared > 48 << 10 else 0)
        assert found["attributes"] == (EARLY if made.overlap and (i or follows) else [])
        *values, one, two = found["parameters"]
        assert (one, two) == (0, 0)
        for value, (kind, *rest) in zip(
            values, expected.values(made, SIZES[0], tokens, buffers), strict=True
        ):
            if kind == "number":
                assert value == rest[1]
            elif kind == "map":
                check_map(maps[value], *rest, places)
            else:
                assert value == (0 if rest[0] is None else places.setdefault(rest[0], value))
    ends = WORKSPACE
    for place, size in sorted((places[name], buffers[name][1]) for name in buffers):
        assert place >= ends and (place - WORKSPACE) % 256 == 0
        ends = place + size
    assert ends <= WORKSPACE + room


def check_map(
    found: dict[str, Any], name: str, rows: int, columns: int, tile_rows: int, tile_columns: int,
    swizzle: int, element: int, size: int, places: dict[str, int],
) -> None:  # fmt: skip
    assert found["at"] == places.setdefault(name, found["at"])
    assert found == {
        "map": found["map"], "at": found["at"], "aligned": 1, "element": element, "rank": 2,
        "extents": [columns, rows], "stride": columns * size, "tile": [tile_columns, tile_rows],
        "steps": [1, 1], "interleave": 0, "swizzle": swizzle, "promotion": 2, "fill": 0,
    }  # fmt: skip


def test_preparing_loads_all_that_runs(
    launcher: Path, program: Path, fake: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    drive(fake, launcher, program, "prepare", 1, 300, FAKE_LOG=log, FAKE_CC=90)
    said = [json.loads(line) for line in log.read_text().splitlines()]
    launched = next(i for i, each in enumerate(said) if "launch" in each)
    loads = [i for i, each in enumerate(said) if "load" in each]
    kernels = {
        one.kernel.offset
        for variant in read(program.read_bytes()).targets[90]
        for one in variant.launches
    }
    assert max(loads) < launched and len(loads) == len(kernels)  # though 8 threads prepared


@pytest.mark.parametrize(
    ("arguments", "given", "parts"),
    [
        ((16,), {"FAKE_CC": 80}, ("compute capability 80", "89, 90, 120", "export")),
        ((16,), {"FAKE_CONTEXT": 0}, ("no CUDA context",)),
        ((16, "misplaced"), {}, ("router", "not aligned", "16 bytes")),
        ((16, "small"), {}, ("workspace", "for 16 tokens")),
    ],
)
def test_refusals(
    launcher: Path, program: Path, fake: Path, arguments: tuple[object, ...],
    given: dict[str, object], parts: tuple[str, ...],
) -> None:  # fmt: skip
    said = drive(fake, launcher, program, *arguments, **given)["failed"]
    assert all(part in said for part in (*parts, "found", "expected")), said


def test_without_a_driver(launcher: Path, program: Path, no_driver: Path) -> None:
    said = drive(no_driver, launcher, program, 16)["failed"]
    assert "NVIDIA's driver" in said and "libcuda.so.1" in said and "where there is a GPU" in said


def test_programs_that_are_not_whole(launcher: Path, program: Path, no_driver: Path) -> None:
    said = drive(no_driver, launcher, program, "break")
    assert all("a moec program" in each and "export again" in each for each in said), said


def test_the_workspace_is_the_most_that_fewer_tokens_need(
    launcher: Path, program: Path, fake: Path, tmp_path: Path
) -> None:
    counts = [*range(1, 70), 128, 129, 600, 601, 10_000]
    found = drive(fake, launcher, program, *counts, FAKE_LOG=tmp_path / "log", FAKE_CC=89)["rooms"]
    rooms = [found[str(tokens)] for tokens in counts]
    assert rooms == sorted(rooms) and rooms[-1] == rooms[-2] == rooms[-3]
