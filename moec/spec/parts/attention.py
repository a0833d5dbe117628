"""What attention keeps from call to call, and multi-head latent attention."""

from typing import NamedTuple

from moec.spec.data import Frozen
from moec.spec.parts.sizes import Epsilon, HeadDim, Width


class Latent(Frozen):
    """Multi-head latent attention (https://arxiv.org/abs/2405.04434), for all heads of a layer.

    A token is projected to a latent vector of width `kv_rank`, from which each head makes its key,
    of width `nope`, and its value. A further part of the key, of width `rope`, is rotated and
    serves all heads. Queries come from a latent vector of width `q_rank`, or straight from the
    token. The cache holds the latent vector and the rotated part. `norm_eps` is the epsilon of the
    norms of both latent vectors.
    """

    q_rank: Width | None
    kv_rank: Width
    nope: HeadDim
    rope: HeadDim
    value: HeadDim
    norm_eps: Epsilon = 1e-6


class CacheSpec(NamedTuple):
    """One tensor that a layer keeps for each token."""

    kind: str  # its part of the names `past.{i}.{kind}` and `present.{i}.{kind}`
    heads: int
    size: int  # elements of one head
    kept: int | None  # how many tokens it keeps at most; None: all

    @property
    def width(self) -> int:
        """Elements of one token."""
        return self.heads * self.size
