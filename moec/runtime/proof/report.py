"""The report of a proof: its checks, with their figures and limits, and one verdict."""

import html
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moec.spec.bounded.own import put_at
from moec.spec.errors import visible

#: how every page of a report begins
PAGE = "<!doctype html><meta charset=utf-8><title>moec validate"
_LONE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: an error of at most `limit`, or a share of at least `limit` that agrees."""

    name: str
    kind: str  # "error" or "agreement"
    found: float
    limit: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure keeps its limit; False for NaN."""
        return self.found <= self.limit if self.kind == "error" else self.found >= self.limit

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON; a figure that is not finite becomes None."""
        found = self.found if math.isfinite(self.found) else None
        return {**asdict(self), "found": found, "passed": self.passed}


@dataclass(slots=True)
class Report:
    """What was compared with what, on which tokens, and with which result.

    Attributes:
        subject: what was proven.
        engine, reference: what ran it, and what it was compared with.
        precision: the precision of the artefact.
        seed: the seed of the tokens.
        tokens: the length of each sequence.
        twin: whether a reduced-size model was proven.
        checks: the comparisons, in the order in which values are computed.
        notes: remarks for the reader.
        versions: the versions of the packages that built the artefact.
        cost: what the precision costs, if that was measured.
        identity: the artefact that was proven, by `moec.artefact.parity.identity`.
    """

    subject: str
    engine: str
    reference: str
    precision: str
    seed: int
    tokens: list[int]
    twin: bool = False
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    cost: dict[str, object] | None = None
    identity: str | None = None

    @property
    def passed(self) -> bool:
        """Whether there were checks, and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def first_divergence(self) -> str | None:
        """The name of the first check that failed, or None."""
        return next((check.name for check in self.checks if not check.passed), None)

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON and for the manifest, all of it UTF-8."""
        values = asdict(self) | {
            "checks": [check.to_dict() for check in self.checks],
            "passed": self.passed,
            "first_divergence": self.first_divergence,
        }
        return {key: _storable(value) for key, value in values.items()}

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained HTML page with every check to `path`."""
        cost = "".join(
            "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>"
            for row in (cost_cells(self.cost) if self.cost else ())
        )
        if cost:
            where = _text(self.cost["reference"]) if self.cost else ""
            cost = f"<h2>What the precision costs, against {where}</h2><table>{cost}</table>"
        rows = "".join(
            f"<tr class={'ok' if check.passed else 'bad'}>"
            + "".join(f"<td>{_text(cell)}</td>" for cell in cells(check.to_dict()))
            for check in self.checks
        )
        verdict = "PASSED" if self.passed else f"FAILED, first at {self.first_divergence}"
        ran = (
            f"{self.engine} against {self.reference}, {self.precision}, rows of "
            f"{spoken(self.tokens)} tokens, seed {self.seed}"
        )
        notes = "".join(f"<p>{_text(note)}</p>" for note in self.notes)
        put_at(
            path,
            f"{PAGE}</title><style>"
            "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:left}"
            ".bad{background:#fdd}</style>"
            f"<h1>{_text(self.subject)}: {_text(verdict)}</h1>"
            f"<p>{_text(ran)}</p>{notes}<table>"
            f"<tr><th>check<th>found<th>limit<th>detail</tr>{rows}</table>{cost}",
        )


def _storable(value: Any) -> Any:
    """`value` with U+FFFD for each lone surrogate, which paths that are not UTF-8 have."""
    if isinstance(value, str):
        return value if value.isascii() else _LONE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_storable(key): _storable(each) for key, each in value.items()}
    return [_storable(each) for each in value] if isinstance(value, list | tuple) else value


def _text(value: object) -> str:
    """A value as text of a web page, whatever characters it has."""
    return html.escape(visible(str(value)))


def spoken(lengths: list[int]) -> str:
    """The lengths of sequences in words; a pair of lengths that repeats is named once."""
    pair, many = lengths[:2], len(lengths) // 2
    return f"{many} x {pair}" if many > 1 and lengths == pair * many else str(lengths)


def cells(check: dict[str, Any]) -> tuple[str, str, str, str]:
    """A check as a row of a table: name, figure, limit, detail."""
    found, limit = check["found"], check["limit"]
    if found is None:
        return check["name"], "not finite", f"<= {limit:.0e}", check["detail"]
    if check["kind"] == "error":
        return check["name"], f"{found:.2e}", f"<= {limit:.0e}", check["detail"]
    return check["name"], f"{100 * found:.2f} %", f">= {100 * limit:g} %", check["detail"]


def cost_cells(cost: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What a precision costs, as rows of a table: name, figure, detail."""
    before, after = cost["reference_perplexity"], cost["perplexity"]
    change = f"{100 * (after / before - 1):+.2f} %, from {before:.4f}"
    found = [
        ("perplexity", f"{after:.4f}", change),
        ("KL", f"{cost['kl']:.2e}", f"nats a token; 99 % below {cost['kl_99']:.2e}"),
        ("same choice", f"{100 * cost['same_choice']:.2f} %", "of the likeliest token"),
    ]
    if cost["flips"]:
        at = max(cost["flips"], key=cost["flips"].__getitem__)
        detail = f"of tokens and layers; most {100 * cost['flips'][at]:.2f} %, in {at}"
        found.append(("router flips", f"{100 * cost['router_flips']:.2f} %", detail))
    return found + [
        (name, f"{each:.2e}", "relative error of its output")
        for name, each in cost["layers"].items()
    ]
