"""Runs in a process with TRITON_INTERPRET=1: the prefill MoE against its twin, without a GPU."""

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from interpret import weights

from moec.kernels import twin
from moec.kernels.launch import Sizes
from moec.kernels.launch_prefill import Product, Tiles
from moec.kernels.torch_prefill import PrefillMoe

_dot = interpreter.InterpreterBuilder.create_dot


def _dot_of_bf16(self, a, b, *rest):  # type: ignore[no-untyped-def]
    """The interpreter has bf16 as integers, and multiplies those."""
    wide = [
        interpreter.TensorHandle((each.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if each.dtype.scalar == tl.bfloat16 else each
        for each in (a, b)
    ]  # fmt: skip
    return _dot(self, *wide, *rest)


interpreter.InterpreterBuilder.create_dot = _dot_of_bf16
_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope):  # type: ignore[no-untyped-def]
    """The bounds of a loop may be loaded: arrays of one, which numpy will not cast."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index
LOOPS = {
    "one": Product(columns=64, depth=64, chunk=0, flatten=True),
    "exact": Product(columns=64, depth=64, chunk=0, exact=64),
    "chunk": Product(columns=64, depth=64, chunk=128),
}


def main() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    for experts, tokens, loop in (
        (4, 9, "one"), (4, 100, "exact"), (16, 150, "chunk"), (1, 64, "one"), (5, 65, "chunk"),
    ):  # fmt: skip
        sizes = Sizes(dim=128, hidden=256, experts=experts)
        given = weights(sizes)
        product = LOOPS[loop]
        layer = PrefillMoe(sizes, given, Tiles(32, product, product, programs=3, hopper=False))
        x = torch.randn(tokens, sizes.dim).bfloat16()
        found = layer(x)
        expected = twin.decode_moe(given, x)
        error = ((found.float() - expected).norm() / expected.norm()).item()
        print(experts, tokens, loop, error, torch.equal(layer(x), found))


if __name__ == "__main__":
    main()
