"""Arithmetic that Gluon has no function for, as inline PTX."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def add_truncated(total, left, right):
    """Add left and right to the two bf16 in total; return truncated sums and two remainders."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t, u;
        .reg .f32 a, b;
        shl.b32 t, $3, 16;
        and.b32 u, $3, 0xffff0000;
        mov.b32 a, t;
        mov.b32 b, u;
        add.f32 a, a, $4;
        add.f32 b, b, $5;
        mov.b32 t, a;
        mov.b32 u, b;
        prmt.b32 $0, t, u, 0x7632;
        and.b32 t, t, 0xffff0000;
        and.b32 u, u, 0xffff0000;
        mov.b32 $1, t;
        mov.b32 $2, u;
        sub.f32 $1, a, $1;
        sub.f32 $2, b, $2;
        }""",
        "=&r,=&f,=&f,r,f,f",
        [total, left, right],
        dtype=(gl.int32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def add(total, left, right):
    """Add left and right to the two bf16 in total, an int32; return two float32."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        .reg .f32 a, b;
        shl.b32 t, $2, 16;
        mov.b32 a, t;
        and.b32 t, $2, 0xffff0000;
        mov.b32 b, t;
        add.f32 $0, a, $3;
        add.f32 $1, b, $4;
        }""",
        "=&f,=&f,r,f,f",
        [total, left, right],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def sigmoid(x):
    """The sigmoid, from approximate instructions, whose error is far below a rounding to bf16.

    -1.4427, minus the base-2 logarithm of e, turns the exponential into a power of 2.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
