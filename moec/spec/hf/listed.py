"""Find the modules that a checkpoint's quantisation lists, by names or by patterns.

The patterns are a stranger's, and Python's regular expressions may take exponential time. Simple
expressions run here. The others run in a child process with a time limit, to the same result.
"""

import re
from fnmatch import translate
from typing import Any, Literal

from moec.spec.bounded.limits import LISTED, MATCHES, PATTERN
from moec.spec.bounded.worker import shared
from moec.spec.fields import Fields

#: the library whose rules of matching apply
Kind = Literal["compressed-tensors", "modelopt", "transformers"]


def listed(modules: list[str], patterns: list[str], kind: Kind, at: Fields, field: str) -> set[str]:
    """Those of `modules` that one of `patterns` is for; field `field` of `at` has the patterns.

    compressed-tensors lists classes, modules, and expressions after `re:`. ModelOpt lists patterns
    of a shell. transformers lists ends of names, or expressions for their starts, which must end at
    a dot or at the end of the name.

    Raises:
        MoecError: a pattern is no valid expression, or is too long; there are too many; or matching
            takes too long.
    """
    plain = {each for each in patterns if _expression(each, kind) is None}
    every = kind == "compressed-tensors" and "Linear" in plain
    found = {each for each in modules if every or plain.intersection(_spellings(each))}
    simple: list[str] = []
    other: list[str] = []
    for each in dict.fromkeys(patterns):
        expression = _expression(each, kind)
        if expression is None:
            continue
        if len(each) > PATTERN:
            expected = f"patterns of at most {PATTERN} characters"
            raise at.error(field, f"{each[:80]!r}, of {len(each):,} characters", expected)
        (simple if kind == "modelopt" or is_simple(each) else other).append(expression)
    count = len(simple) + len(other)
    if count > LISTED or 4 * count * len(modules) > MATCHES:
        expected = f"at most {LISTED:,} patterns, and {MATCHES:,} comparisons"
        raise at.error(field, f"{count:,} patterns for {len(modules):,} modules", expected)
    for expression in (*simple, *other):
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise at.error(field, f"{expression!r}: {error}", "valid regular expressions") from None
    left = [module for module in dict.fromkeys(modules) if module not in found]
    ends = tuple(patterns) if kind == "transformers" else ()
    one = "|".join(f"(?:{each})" for each in simple)  # a call for each name, and not for each pair
    found.update(matching(left, [one] if simple else [], ends))
    if other:
        indices, _ = shared().ask(
            f"{__name__}:match_all",
            {"modules": left, "expressions": other},
            where=f"{at.where}.{field}",
            what=f"match expressions such as {other[0]!r}",
            next_step=at.next_step,
        )
        found.update(left[index] for index in indices)
    return found


def _expression(pattern: str, kind: Kind) -> str | None:
    """The regular expression that `pattern` stands for; None if it is a name."""
    if kind == "transformers":
        return rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"
    if kind == "modelopt":
        return translate(pattern) if set("*?[") & set(pattern) else None
    return pattern[3:] if pattern.startswith("re:") else None


def is_simple(pattern: str) -> bool:
    """Whether an expression takes at most quadratic time, whatever it is matched with.

    It then has at most two repeats of one character or set, and two groups, none of them repeated.
    """
    bare = re.sub(r"\\[.\-dDwWsS]|\[\^?[\w.\-]+\]", "a", pattern.removeprefix("re:"))
    bare = bare.replace("(?:", "(")
    return (
        re.search(r"[^\w.|^$()*+?\-]|\)[*+?]|[*+?][*+?]|\(\?", bare) is None
        and len(re.findall(r"[*+?]", bare)) <= 2
        and bare.count("(") <= 2
    )


def _spellings(module: str) -> tuple[str, str, str, str]:
    """The names of a module: the libraries that write lists disagree on what is before `model.`."""
    bare = module.removeprefix("language_model.")
    return module, bare, f"model.{module}", f"model.language_model.{bare}"


def matching(modules: list[str], expressions: list[str], ends: tuple[str, ...] = ()) -> list[str]:
    """Those of `modules` whose start an expression matches, or that end with one of `ends`."""
    tests = [re.compile(each).match for each in expressions]
    return [
        module
        for module in modules
        if any(
            name.endswith(ends) or any(test(name) for test in tests)
            for name in set(_spellings(module))
        )
    ]


def match_all(_: bytes, modules: list[str], expressions: list[str]) -> tuple[list[Any], bytes]:
    """The indices of those `modules` that an expression matches; for the child process."""
    found = set(matching(modules, expressions))
    return [index for index, module in enumerate(modules) if module in found], b""
