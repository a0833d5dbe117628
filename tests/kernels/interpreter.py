"""Triton's interpreter, told what it gets wrong; imported by scripts with TRITON_INTERPRET=1."""

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

NARROW = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16}
_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot
_patch = interpreter._patch_lang_tensor
_patch_lang = interpreter._patch_lang
_patched = set[str]()


def _rounding(values, source, target, mode):  # type: ignore[no-untyped-def]
    """Its own conversions truncate to bf16 and carry wrongly to E4M3."""
    if source == tl.float32 and target in NARROW:
        wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32).copy())
        size = torch.uint8 if target == tl.float8e4nv else torch.uint16
        return wide.to(NARROW[target]).view(size).numpy().reshape(values.shape)
    return _convert(values, source, target, mode)


def _dot_of_bf16(self, a, b, *rest):  # type: ignore[no-untyped-def]
    """It has bf16 as integers, and multiplies those."""
    wide = [
        interpreter.TensorHandle((each.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if each.dtype.scalar == tl.bfloat16 else each
        for each in (a, b)
    ]  # fmt: skip
    return _dot(self, *wide, *rest)


def _patch_with_index(tensor, scope):  # type: ignore[no-untyped-def]
    """The bounds of a loop may be loaded: arrays of one, which numpy will not cast."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_lang_once(fn):  # type: ignore[no-untyped-def]
    """It patches the language again for each call of a function: a third of its time.

    What is patched depends on the function's module alone. Nothing is undone: the process ends.
    """
    module = fn.__module__
    if module not in _patched:
        _patched.add(module)
        _patch_lang(fn)
    return interpreter._LangPatchScope()


interpreter._convert_float = _rounding
interpreter.InterpreterBuilder.create_dot = _dot_of_bf16
interpreter._patch_lang_tensor = _patch_with_index
interpreter._patch_lang = _patch_lang_once
