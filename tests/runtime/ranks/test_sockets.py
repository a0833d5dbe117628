"""How ranks exchange bytes on the host: nobody else can take part, and nothing is unpickled."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moec
from moec.runtime.ranks import group
from moec.runtime.ranks.session import SharedSession
from moec.runtime.ranks.sockets import _exchange, pairs
from moec.spec.sharding import Rank


def listening(pid: int) -> list[str]:
    """The addresses at which a process listens, as /proc/net/tcp has them."""
    links = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in links:
                found.append(address)
    return found


def test_ranks_on_cpus_listen_nowhere(art: Path) -> None:
    with closing(moec.open_session(art, "cpu", gpus=2)) as session:
        assert isinstance(session, SharedSession)
        session.generate([[5, 6, 7]], max_new_tokens=2, stop=())
        processes = session.ranks._processes
        assert [listening(each.pid) for each in processes] == [[], []]
    assert not any(Path(f"/proc/{each.pid}").exists() for each in processes)


def at_once(count: int, run: Callable[[int, dict[int, Connection]], object]) -> list[object]:
    """What `run` gives for each rank, with its ends of the pairs; all run at once."""
    with pairs(count) as ends, ThreadPoolExecutor(count) as threads:
        peers = [
            {
                index: Connection(os.dup(number))
                for index, number in zip((i for i in range(count) if i != own), mine, strict=True)
            }
            for own, mine in enumerate(ends)
        ]
        return list(threads.map(run, range(count), peers))


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_all_get_what_each_sends(count: int, size: int) -> None:
    sent = [torch.randint(0, 256, (size,)).to(torch.uint8) for _ in range(count)]
    found = at_once(count, lambda own, peers: _exchange(sent[own], Rank(own, count), peers))
    for each in found:
        assert isinstance(each, list) and all(map(torch.equal, each, sent))


def test_another_size_is_an_error() -> None:
    def sizes(own: int, peers: dict[int, Connection]) -> object:
        with pytest.raises(RuntimeError, match=f"sent {4 - own} bytes, not {3 + own}"):
            _exchange(torch.zeros(3 + own, dtype=torch.uint8), Rank(own, 2), peers)
        return True

    assert at_once(2, sizes) == [True, True]


@pytest.mark.parametrize("own", [0, 1])
def test_a_lost_rank_is_an_error(own: int) -> None:
    mine, theirs = Pipe()
    theirs.close()
    with pytest.raises(ConnectionError, match="no longer answers"):
        _exchange(torch.zeros(3, dtype=torch.uint8), Rank(own, 2), {1 - own: mine})


def test_what_ranks_tell_each_other_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(x: Tensor) -> list[Tensor]:
        return [x, x]

    monkeypatch.setattr(group, "gathered", gathered)
    for value in ("\udce9 ü", 2**61, None, ["a", 1.5]):
        assert group._gathered_json(value) == [value, value]
    with pytest.raises(TypeError):
        group._gathered_json(Path("x"))
