"""The kernels for many tokens beside float32: on a GPU, or interpreted."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moec.kernels.launches.attend_many import Cut, attend_many
from moec.kernels.launches.many_linear import many_linear
from moec.kernels.launches.prefill import Product
from moec.kernels.sizes import Heads
from moec.kernels.torch.launch import run
from tests.kernels.step_cases import narrow


class Attention(NamedTuple):
    """Operands of the kernel. Slots after a row's `last` hold NaN."""

    heads: Heads
    q: Tensor
    key: Tensor
    value: Tensor
    last: Tensor


class Linear(NamedTuple):
    """Operands of the FP8 linear layer for many tokens."""

    codes: Tensor
    scale: Tensor
    weight: Tensor
    weight_scale: Tensor


#: width, dim, tokens
LINEAR = ((192, 128, 65), (256, 192, 300), (320, 128, 128), (64, 256, 7))
#: heads, key/value heads, size, tokens, slots, the newest slot of each row
ATTENTION = (
    (4, 4, 32, 70, 140, (69, 131, 132)),  # tokens begin one slot before a tile does, and with it
    (8, 2, 32, 37, 140, (139, 36, 90)),
    (5, 1, 128, 65, 150, (130, 149)),
    (2, 2, 16, 130, 131, (130,)),
    (2, 1, 256, 33, 50, (49,)),
    (4, 1, 64, 20, 64, (9, 40)),  # ten tokens of the first row have no slot
)

#: largest relative error, of all and of any row or column
MOST, MOST_ANYWHERE = 4e-3, 2e-2


def random_attention() -> tuple[int, int, int, int, int, tuple[int, ...]]:
    """A case like those of `ATTENTION`, of two rows."""
    kv_heads, group, size = (int(torch.randint(1, most, ())) for most in (3, 6, 4))
    steps = int(torch.randint(1, 100, ()))
    slots = steps + int(torch.randint(0, 100, ()))
    newest = torch.randint(steps - 1, slots, (2,)).tolist()
    return kv_heads * group, kv_heads, 16 << size, steps, slots, tuple(newest)


def attention(
    device: str,
    heads: int,
    kv_heads: int,
    size: int,
    steps: int,
    slots: int,
    last: tuple[int, ...],
    expect: bool = True,
) -> tuple[Attention, Tensor]:
    """Random operands, and what attention gives in float32: NaN where a token sees no slot.

    Without `expect` nothing is computed.
    """
    batch = len(last)
    q = torch.randn(batch, steps, heads * size, device=device).bfloat16()
    key, value = (
        2 * torch.randn(batch, kv_heads, slots, size, device=device).bfloat16() for _ in range(2)
    )
    expected = torch.empty(batch, steps, heads, size, device=device)
    for row, newest in enumerate(last if expect else ()):
        key[row, :, newest + 1 :], value[row, :, newest + 1 :] = torch.nan, torch.nan
        queries = q[row].view(steps, heads, size).transpose(0, 1).float()
        k, v = (
            each[row, :, : newest + 1].float().repeat_interleave(heads // kv_heads, 0)
            for each in (key, value)
        )
        own = newest - steps + 1 + torch.arange(steps, device=device)
        unseen = torch.arange(newest + 1, device=device) > own[:, None]
        scores = (queries @ k.transpose(1, 2) * size**-0.5).masked_fill(unseen, -torch.inf)
        expected[row] = (scores.softmax(2) @ v).transpose(0, 1)
    newest = torch.tensor(last, dtype=torch.int32, device=device)
    found = Attention(Heads(heads, kv_heads, size), q, key, value, newest)
    return found, expected.flatten(2)


def attention_launch(
    given: Attention, architecture: int, programs: int, cut: Cut | None = None
) -> Callable[[], Tensor]:
    """The kernel as a function of nothing, which gives a tensor that held NaN before."""
    batch, steps, _ = given.q.shape
    out = torch.full_like(given.q, torch.nan)
    launch = attend_many(given.heads, batch, steps, architecture, programs, cut)
    values = {**given._asdict(), "out": out, "steps": steps, "slots": given.key.shape[2]}

    def call() -> Tensor:
        run(launch, values)
        return out

    return call


def attention_by_kernel(
    given: Attention, architecture: int, programs: int, cut: Cut | None = None
) -> Tensor:
    """What the kernel gives, in a new tensor."""
    return attention_launch(given, architecture, programs, cut)()


def linear(device: str, width: int, dim: int, tokens: int) -> tuple[Linear, Tensor]:
    """Random operands, and what the layer gives in float64."""
    codes, scale = narrow(tokens, dim, device=device)
    weight, weight_scale = narrow(width, dim, device=device)
    expected = codes.double() @ weight.double().t() * scale[:, None] * weight_scale
    return Linear(codes, scale, weight, weight_scale), expected


def linear_launch(
    given: Linear, architecture: int, programs: int, cut: Product | None = None
) -> Callable[[], Tensor]:
    """The kernel as a function of nothing, which gives a tensor that held NaN before."""
    (tokens, dim), width = given.codes.shape, len(given.weight)
    out = torch.full((tokens, width), torch.nan, device=given.codes.device).bfloat16()
    launch = many_linear(width, dim, tokens, architecture, programs, cut)
    values = {**given._asdict(), "out": out, "tokens": tokens}

    def call() -> Tensor:
        run(launch, values)
        return out

    return call


def linear_by_kernel(
    given: Linear, architecture: int, programs: int, cut: Product | None = None
) -> Tensor:
    """What the kernel gives, in a new tensor."""
    return linear_launch(given, architecture, programs, cut)()


def wrong(found: Tensor, expected: Tensor, most: float = MOST) -> str:
    """What is wrong with `found`; empty: nothing. Where NaN is expected, any number will do.

    Errors of a row or column are relative to its size, or to half of the usual size where it is
    smaller: a column of two tokens may happen to be nearly zero.
    """
    if not found.isfinite().all():
        return f"{int((~found.isfinite()).sum())} results are no numbers"
    width = expected.shape[-1]
    expected = expected.reshape(-1, width).double()
    off = torch.nan_to_num(found.reshape(-1, width).double() - expected)
    size = torch.nan_to_num(expected)
    whole = float(off.norm() / size.norm())
    rows, columns = (
        float((off.norm(dim=i) / each.clamp(min=float(each.median()) / 2)).max())
        for i in (1, 0)
        for each in [size.norm(dim=i)]
    )
    if whole <= most and max(rows, columns) <= MOST_ANYWHERE:
        return ""
    return f"errors: {whole:.1e} in all, {rows:.1e} in a row, {columns:.1e} in a column"


def checked(call: Callable[[], Tensor], expected: Tensor, most: float = MOST) -> str:
    """What is wrong with what `call` gives, thrice."""
    found = call()
    again = all(torch.equal(call(), found) for _ in range(2))
    return wrong(found, expected, most) or ("" if again else "runs differ")
