"""The one error type that users see, and how failures of other libraries become one.

A MoecError is what a user can act on. An exception that is neither a MoecError nor in the table
below is a bug of moec: the API lets it through with its traceback.
"""

import errno
import os
import re
import unicodedata
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class MoecError(Exception):
    """An error in four lines: where it is, what was found, what was expected, what to run next.

    No part is ever empty. The command line exits with `exit_code`: 2 for bad input, 3 for a
    missing package or device, 1 for a check that failed.
    """

    def __init__(
        self, where: object, found: object, expected: object, next_step: str, exit_code: int = 2
    ) -> None:
        self.where, self.found = _line(where), _line(found)
        self.expected, self.next_step = _line(expected), _line(next_step)
        self.exit_code = exit_code
        super().__init__(self.where, self.found, self.expected, self.next_step)

    def __str__(self) -> str:
        return (
            f"{self.where}\n  found:    {self.found}\n  expected: {self.expected}\n"
            f"  next:     {self.next_step}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the exit code too: an error comes back whole from another process."""
        parts = self.where, self.found, self.expected, self.next_step, self.exit_code
        return type(self), parts


def refuse(
    where: object,
    found: object,
    expected: object,
    next_step: str,
    *,
    exit_code: int = 2,
    cause: BaseException | None = None,
) -> NoReturn:
    """Raise a `MoecError` with these four parts.

    The traceback leaves out the exception that is being handled, because the message already says
    what it meant. Pass the exception as `cause` where a developer needs its traceback too.

    Raises:
        MoecError: always.
    """
    raise MoecError(where, found, expected, next_step, exit_code) from cause


#: characters of one part of a message
_LONGEST = 4096
#: characters without a glyph that scripts and emoji need: the joiners
_JOINERS = "\u200c\u200d"
#: categories of Unicode that steer a terminal or hide in it: control characters, formats (text
#: direction among them), lone surrogates, separators of lines and paragraphs
_STEERING = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


def visible(text: str, keep: str = "") -> str:
    r"""Make `text` safe for a terminal: an escape character becomes the four characters \x1b.

    The characters in `keep` stay as they are, such as a line break in text of several lines.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        each
        if each in keep or each in _JOINERS or unicodedata.category(each) not in _STEERING
        else each.encode("unicode_escape").decode()
        for each in text
    )


def clear_errors(call: Callable[P, T], where: str = "") -> Callable[P, T]:
    """Decorate what users call: failures of other libraries leave it as MoecErrors.

    `where` is what a message names, by default the function. The exception itself is the
    `__cause__`. Bugs of moec pass through as they are.
    """

    @wraps(call)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except BaseException as error:  # libraries in Rust panic with what is no Exception
            clear = understood(error, where or call.__name__)
            if clear is None or clear is error:
                raise
            raise clear from error

    return called


def understood(error: BaseException, where: str) -> MoecError | None:
    """The message for `error`, which was raised in `where`; None for a bug of moec."""
    if isinstance(error, MoecError):
        return error
    said = next(iter(str(error).strip().splitlines()), "")
    found = ": ".join(filter(None, (type(error).__name__, said)))
    if isinstance(error, OSError):
        return _of_the_system(error, where)
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if package == "moec":
            return None
        return MoecError(
            f"package {package or 'of another project'}",
            said or "not installed",
            "a package that is installed and loads",
            f"pip install {package}" if package else "install the package again",
            3,
        )
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    for kind, pattern, expected, next_step, exit_code in _KINDS:
        fits = isinstance(error, kind) if isinstance(kind, type) else re.match(kind, name)
        if fits and re.search(pattern, str(error)):
            return MoecError(where, found, expected, next_step, exit_code)
    return None


_DAMAGED = "look for a damaged or foreign file, and download or build it again"
_MEMORY = (
    "sizes that fit this machine's memory",
    "use a smaller batch, context or model; moec plan prints the memory that they need",
    3,
)
#: (a type, or a pattern for its full name; a pattern for its message; what was expected; what to do
#: next; exit code) of failures that are no bug of moec. The first row that fits counts.
_KINDS: tuple[tuple[type[BaseException] | str, str, str, str, int], ...] = (
    (MemoryError, "", *_MEMORY),
    # torch has no type for it on the CPU
    (RuntimeError, "out of memory|not enough memory|can't allocate|calculation overflow", *_MEMORY),
    (Exception, "Overflow when unpacking", "numbers within range", "use smaller numbers", 2),
    (OverflowError, "", "numbers within range", "use smaller numbers", 2),
    (RecursionError, "", "data that is nested less deeply", _DAMAGED, 2),
    (UnicodeError, "", "text in UTF-8", "save the text as UTF-8", 2),
    (ValueError, "embedded null", "a path without a zero byte", "correct the path", 2),
    (RuntimeError, "Symlink loop", "a path whose links end at a file", "correct the links", 2),
    (RuntimeError, "home directory", "a home folder", "set HOME", 2),
    (r"torch\b.*AcceleratorError$", "", "a GPU that works", "run it again, or use device cpu", 3),
    (r"onnxruntime\.", "ailed to allocate memory|bad_alloc", *_MEMORY),
    (r"onnxruntime\.", "", "a graph that ONNX Runtime runs", _DAMAGED, 1),
    (r"(onnx|onnx_ir|google)\.", "", "a sound ONNX file", _DAMAGED, 1),
    (r"(PIL|jinja2|json|pydantic|safetensors|yaml)", "", "sound data", _DAMAGED, 2),
    (r"(struct|zlib)\.error$", "", "sound data", _DAMAGED, 2),
    (r"pyo3_runtime\.|builtins\.Exception$", "", "sound data", _DAMAGED, 2),  # libraries in Rust
)


def _of_the_system(error: OSError, where: str) -> MoecError:
    """The message for an error of the operating system; it names the file if the error does."""
    found = error.strerror or str(error) or type(error).__name__
    if error.filename is None and error.errno == errno.ENOENT and not _has_current_folder():
        return MoecError(
            where, f"{found}: the current folder", "a current folder that exists", "cd to another"
        )
    expected, next_step = "a file or folder that can be used", "check the path and its permissions"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        expected, next_step = "room on the disk", "make room, or write elsewhere"
    elif found.startswith("No usable temporary directory"):  # it tried to write a file in each
        expected, next_step = "a folder for temporary files", "set TMPDIR, or raise ulimit -f"
    return MoecError(
        where if error.filename is None else error.filename, found, expected, next_step
    )


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _line(text: object) -> str:
    """Put `text` on one line; an empty text becomes "nothing".

    A name from a file may hold control characters. Each of them becomes "?". It may also be longer
    than a screen, and is then cut.
    """
    text = str(text)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]} ..."
    line = " ".join(text.splitlines()).strip()
    return "".join(char if char.isprintable() else "?" for char in line) or "nothing"
