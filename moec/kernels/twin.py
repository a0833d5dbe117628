"""What the kernels compute, in plain torch: the same roundings, in float32 where they have none.

It differs from the eager op `moec::fp8_moe` in bf16 by where that rounds: the op to bf16 after each
product and each factor, the kernels once, what SwiGLU made.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from moec.graph_builder.ops.fp8 import rounded


def decode_moe(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x bf16 [T, D] -> float32 [T, D]; weights as `DecodeMoe` has them."""
    wide = x.float()
    logits = (wide @ weights["router"].float().t()).bfloat16()
    best, chosen = logits.max(-1)
    score = best.float().sigmoid().bfloat16().float()
    shared = len(weights["gate_up"]) - 1
    out = torch.zeros_like(wide)
    for expert in [*torch.unique(chosen).tolist(), shared]:
        mine = chosen == expert if expert != shared else torch.ones_like(chosen, dtype=torch.bool)
        rows = wide[mine] * (1 if expert == shared else score[mine, None])
        gate, up = _product(weights, "gate_up", expert, rows).chunk(2, -1)
        act = (functional.silu(gate) * up).bfloat16().float()
        out[mine] += _product(weights, "down", expert, act)
    return out


def _product(weights: Mapping[str, Tensor], name: str, expert: int, rows: Tensor) -> Tensor:
    weight = weights[name][expert].float() * weights[f"{name}_scale"][expert][:, None]
    return rounded(rows, None, "token", 0, None) @ weight.t()
