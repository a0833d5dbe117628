"""Choose the next token from logits."""

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """logits [B, vocab] -> tokens, int64 [B]. Temperature 0 is greedy; filters come after it."""
    if temperature == 0:
        return logits.argmax(-1)
    ordered, tokens = (logits.double() / temperature).sort(-1, descending=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    shares = ordered.softmax(-1)
    if top_p is not None:
        # Keep the smallest set that reaches top_p: drop what begins after it was reached.
        shares[shares.cumsum(-1) - shares >= top_p] = 0
    drawn = torch.multinomial(shares, 1, generator=generator)
    return tokens.gather(-1, drawn)[:, 0]
