"""Rules of the code itself: how refusals are written, and how large files and folders may get."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from moec.spec.errors import MoecError, refuse
from tests.conftest import ROOT

MOEC = ROOT / "moec"
#: the parts of a message, in the order of the arguments
PARTS = ("where", "found", "expected", "next_step")
LONGEST, SHORTEST, MOST_MODULES, MOST_SKIPS = 400, 20, 14, 39  # lines, lines, files, comments
#: modules that may be short whatever they hold
SHORT = {"__init__.py", "__main__.py", "cli.py"}


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    """Every module of moec, parsed."""
    paths = sorted(MOEC.rglob("*.py"))
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def called(node: ast.expr) -> str:
    """The last name of what is called, or of what stands there without a call."""
    function = node.func if isinstance(node, ast.Call) else node
    return function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)


def place(path: Path, node: ast.expr | ast.stmt) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:120]}"


def refusals() -> Iterator[tuple[Path, ast.Call]]:
    """Every call of `refuse` and `MoecError`."""
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and called(node) in ("refuse", "MoecError"):
                yield path, node


def is_empty(part: ast.expr) -> bool:
    """Whether `part` is a literal that says nothing: "", " ", None or an f-string of those."""
    if isinstance(part, ast.JoinedStr):
        return all(is_empty(each) for each in part.values)
    return isinstance(part, ast.Constant) and (part.value is None or not str(part.value).strip())


def faults(call: ast.Call) -> Iterator[str]:
    """What a call lacks: a part, or words in one. A part from `*rest` is counted when it runs."""
    given = dict(zip(PARTS, call.args, strict=False))
    given |= {each.arg: each.value for each in call.keywords if each.arg}
    unpacked = any(isinstance(each, ast.Starred) for each in call.args)
    if not unpacked:
        yield from (f"no {name}" for name in PARTS if name not in given)
    yield from (f"{name} is empty" for name, part in given.items() if is_empty(part))


@pytest.mark.parametrize(
    "call, wrong",
    [
        ("refuse('a', 'b', 'c', 'd')", []),
        ("refuse('a', found, expected='c', next_step=f'run {it}')", []),
        ("refuse(f'{name}: x', *rest)", []),
        ("refuse('a', 'b', 'c')", ["no next_step"]),
        ("MoecError('a', 'b', expected='c', exit_code=3)", ["no next_step"]),
        ("errors.refuse('a', '', ' ', f'')", [f"{name} is empty" for name in PARTS[1:]]),
        ("refuse('a', None, 'c', 'd')", ["found is empty"]),
    ],
)
def test_faults_of_a_refusal_are_found(call: str, wrong: list[str]) -> None:
    parsed = ast.parse(call, mode="eval").body
    assert isinstance(parsed, ast.Call) and called(parsed) in ("refuse", "MoecError")
    assert list(faults(parsed)) == wrong


def test_every_refusal_has_four_parts_none_of_them_empty() -> None:
    seen = list(refusals())
    assert len(seen) > 100, "the names of refusals changed: this test sees too few"
    wrong = [f"{place(p, call)}: {fault}" for p, call in seen for fault in faults(call)]
    assert not wrong, "\n".join(wrong)


def test_a_part_that_turns_out_empty_is_not_left_so() -> None:
    """What the tree cannot show: a part that is computed."""
    with pytest.raises(MoecError) as caught:
        refuse("", "\n", " ", "")
    parts = caught.value.where, caught.value.found, caught.value.expected, caught.value.next_step
    assert all(part.strip() for part in parts)


def test_one_function_raises_refusals() -> None:
    wrong = [
        place(path, node)
        for path, tree in trees()
        if path != MOEC / "spec" / "errors.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and node.exc and called(node.exc) == "MoecError"
    ]
    assert not wrong, "call refuse instead:\n" + "\n".join(wrong)


def declares_only(tree: ast.Module) -> bool:
    """Whether a module is a table or a protocol: nothing but imports, values and Protocols."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            if not any(ast.unparse(base).startswith("Protocol") for base in node.bases):
                return False
        elif not isinstance(
            node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.Expr
        ):
            return False
    return True


def test_files_are_neither_long_nor_short() -> None:
    wrong = []
    for path, tree in trees():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        short = lines < SHORTEST and path.name not in SHORT and not declares_only(tree)
        if short or lines > LONGEST:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines")
    assert not wrong, f"from {SHORTEST} to {LONGEST} lines a file:\n" + "\n".join(wrong)


def test_folders_have_few_modules_side_by_side() -> None:
    folders = {path.parent for path in MOEC.rglob("*.py")}
    sizes = {folder: len([*folder.glob("[!_]*.py")]) for folder in folders}
    wrong = [f"{each.relative_to(ROOT)}: {n}" for each, n in sizes.items() if n > MOST_MODULES]
    assert not wrong, f"at most {MOST_MODULES} modules a folder:\n" + "\n".join(wrong)


def lines_with(words: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path, _ in trees()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words in line
    ]


def test_messages_name_the_installed_command() -> None:
    assert not lines_with("python cli.py"), "a wheel has no cli.py: say moec"


def test_the_formatter_is_rarely_switched_off() -> None:
    assert len(found := lines_with("fmt: skip")) <= MOST_SKIPS, "\n".join(found)


def test_other_libraries_get_folders_through_one_check() -> None:
    """A folder may hold more than weights, such as an adapter whose config names code."""
    scripts = MOEC / "runtime" / "proof" / "against"  # they import nothing of moec
    callers = {}
    for path, tree in trees():
        calls = {called(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        if calls & {"from_pretrained", "LLM", "run_other"}:
            callers[path.relative_to(MOEC).as_posix()] = "for_others" in calls
    inside = {path.relative_to(MOEC).as_posix() for path in scripts.glob("run_*.py")}
    assert {name for name, asks in callers.items() if not asks} == inside
    assert len(callers) > len(inside)
