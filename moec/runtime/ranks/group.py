"""The process group of the ranks that share a model, in one rank.

torchrun starts ranks, and so does `moec.runtime.ranks.start`. Both say in environment variables
which rank a process is, and where all of them meet.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from moec.runtime.engines.gpu import check_device
from moec.spec.errors import refuse
from moec.spec.sharding import ALONE, Rank

#: the environment variables that make a process a rank
RANK, WORLD, LOCAL = "RANK", "WORLD_SIZE", "LOCAL_RANK"
#: seconds that a rank waits for the others before it gives up
PATIENCE = 600


def started_as() -> Rank:
    """The rank as which this process was started; alone without the environment variables."""
    if RANK not in os.environ or WORLD not in os.environ:
        return ALONE
    return Rank(int(os.environ[RANK]), int(os.environ[WORLD]))


def join(device: str, rank: Rank) -> None:
    """Join the process group, and on CUDA take the GPU whose number is the local rank.

    A group that this program has joined already is used as it is.

    Raises:
        MoecError: there are fewer GPUs than ranks, or the group has another number of ranks (exit
            code 3).
    """
    if device == "cuda":
        check_device(device, f"rank {rank.index}")
        found, local = torch.cuda.device_count(), int(os.environ.get(LOCAL, rank.index))
        if local >= found:
            refuse(
                f"rank {rank.index} of {rank.count}",
                f"{found} GPUs on this host",
                "a GPU for each rank",
                f"use --gpus {found}",
                exit_code=3,
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        both = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(
            both,
            rank=rank.index,
            world_size=rank.count,
            timeout=timedelta(seconds=PATIENCE),
            device_id=torch.device("cuda", torch.cuda.current_device())
            if device == "cuda"
            else None,
        )
    if dist.get_world_size() != rank.count:
        refuse(
            "torch's process group",
            f"{dist.get_world_size()} ranks",
            f"{rank.count}",
            f"open the session with gpus={dist.get_world_size()}",
            exit_code=3,
        )
