"""The tables that commands print, and the lines below them."""

import re
from collections.abc import Callable, Iterable
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from moec.cli.output import console, say
from moec.runtime.proof.report import cells, cost_cells, spoken
from moec.spec.model import ModelSpec, TextSpec
from moec.spec.parameters import counts
from moec.spec.parts.routing import Experts
from moec.spec.plan import Plan
from moec.spec.presets import PRESETS
from moec.spec.presets.claims import Claim

if TYPE_CHECKING:
    from moec.artefact.artefact import Artefact
    from moec.artefact.manifest import Build, Engine
    from moec.exporters.quantize import Quantised
    from moec.runtime.bench.bench import Timing


def size(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def checkpoint_table(done: "Quantised") -> None:
    """The files of a checkpoint that moec wrote."""
    for note in done.notes:
        say(f"note: {note}")
    table = Table(title=f"{done.path}: FP8, compressed-tensors")
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, bytes_ in done.files.items():
        table.add_row(name, size(bytes_))
    console.print(table)
    say(f"prove what runs from it: moec build --checkpoint {quote(str(done.path))}")


def artefact_tables(art: "Artefact") -> None:
    """Files and costs of a build."""
    manifest = art.manifest
    for note in manifest.spec.notes:
        say(f"note: {note}")
    table = Table(
        title=f"{art.path}: {manifest.spec.name}, {manifest.target}, {manifest.precision}"
    )
    for column in ("file", "size", "origin"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for name, file in manifest.files.items():
        table.add_row(name, size(file.size), "written")
    origin = {
        "in-place": "left in place",
        "link": "hard link",
        "copy": "copied",
        "pack": "rewritten",
    }
    for name, shard in sorted(manifest.weights.shards.items()):
        table.add_row(name, size(shard.size), origin[manifest.weights.mode])
    console.print(table)
    if manifest.weights.folder:
        say(f"weights in {manifest.weights.folder}")
    build = manifest.build
    if build.seconds:  # known to the process that built it
        stages = " · ".join(f"{name} {seconds:.2f} s" for name, seconds in build.seconds.items())
        say(f"stages: {stages}")
    total, tower = counts(manifest.spec), manifest.spec.vision
    say(
        f"{total['text']:,} parameters in the text model ({total['active_text']:,} active)"
        + (f", {total['vision'] + total['projector']:,} in the vision tower" if tower else ""),
    )
    say(
        f"weights {manifest.weights.mode} · {len(manifest.rewritten)} rewritten · "
        f"{size(build.bytes_written)} written · {size(build.bytes_copied)} of weights copied"
        + (f", {size(build.bytes_packed)} rewritten" if build.bytes_packed else "")
        + _rate(build)
        + (f" · peak memory {size(build.peak_bytes)}" if build.peak_bytes else ""),
    )
    for adapter in manifest.adapters:
        say(f"with the adapter {adapter}")
    for engine in manifest.engines.values():
        say(_engine(engine))
        for message in engine.built.messages:
            say(f"warning: {message}", "yellow")
    if manifest.options and not manifest.engines:
        say(f"no engine yet: moec engine {art.path}")
    if manifest.weights.mode == "unbound":
        say(f"no weights yet: moec bind {art.path} --checkpoint DIR")


def _engine(engine: "Engine") -> str:
    """How an engine was built, in a line."""
    built = engine.built
    kinds = ", ".join(f"{count:,} {name}" for name, count in built.precisions.items())
    return (
        f"{engine.file}: {built.package} {built.version} for "
        f"{', '.join(built.architectures) or 'the GPU here'}, built and not run · "
        f"{built.layers:,} layers ({kinds}) · {len(engine.bindings):,} weights as inputs · "
        f"peak memory {size(built.peak_bytes)}"
    )


def _rate(build: "Build") -> str:
    seconds = build.seconds.get("weights", 0)
    if not build.bytes_read or not seconds:
        return ""
    return f" from {size(build.bytes_read)} at {size(build.bytes_read / seconds)}/s"


def report_table(report: dict[str, Any]) -> None:
    """A proof: the layers, then the checks on the whole. Many layers that pass become two rows."""
    table = Table(
        title=f"{report['engine']} ({report['precision']}) against {report['reference']}: "
        f"{report['subject']}"
    )
    for column in ("", "found", "limit", "detail"):
        table.add_column(column, justify="left" if column in ("", "detail") else "right")
    for check in _folded(report["checks"]):
        table.add_row(*map(str, cells(check)), style=None if check["passed"] else "bold red")
    console.print(table)
    if report.get("cost"):
        cost_table(report["cost"])
    for note in report["notes"]:
        say(f"note: {note}")
    verdict = "PASSED" if report["passed"] else f"FAILED, first at {report['first_divergence']}"
    say(
        f"{verdict} · rows of {spoken(report['tokens'])} tokens · seed {report['seed']}",
        style="green" if report["passed"] else "bold red",
    )


def cost_table(cost: dict[str, Any]) -> None:
    """What a precision costs: perplexity, KL, routers, and the error of each layer's output."""
    table = Table(title=f"against {cost['reference']}: {cost['tokens']:,} tokens, {cost['text']}")
    table.add_column("")
    table.add_column("found", justify="right")
    table.add_column("detail")
    for row in cost_cells(cost):
        table.add_row(*row)
    console.print(table)


#: rows of a proof that come once a layer -> what many that pass are shown as
_LADDERS = {
    r"vision\.layers\.\d+": "vision.layers",
    r"layers\.\d+": "layers",
    r"layers\.\d+ router": "routers",
}


def _folded(checks: list[dict[str, Any]], most: int = 12) -> list[dict[str, Any]]:
    """`checks` with the layers that pass as one row a kind, the worst, if there are over `most`."""
    for pattern, label in _LADDERS.items():
        layers = [c for c in checks if re.fullmatch(pattern, c["name"]) and c["passed"]]
        if len(layers) <= most:
            continue
        extreme = max if layers[0]["kind"] == "error" else min
        worst = extreme(layers, key=lambda check: check["found"])
        detail = f"worst of {len(layers)}: {worst['name']}; all with --json"
        at = checks.index(layers[0])
        rest = [check for check in checks[at:] if check not in layers]
        checks = [*checks[:at], {**worst, "name": label, "detail": detail}, *rest]
    return checks


def plan_table(plan: Plan) -> None:
    """The costs of one setting."""
    title = f"{plan.model}, {plan.precision}, batch {plan.batch}, context {plan.context:,}"
    table = Table(title=title if plan.gpus == 1 else f"{title}, each of {plan.gpus} GPUs")
    table.add_column("")
    table.add_column("value", justify="right")

    def bound(milliseconds: float | None) -> str:
        return "give --device" if milliseconds is None else f">= {milliseconds:,.2f} ms"

    rows = {
        "weights": size(plan.weights_bytes),
        "caches (rings on chunked layers)": size(plan.cache_bytes),
        "caches without rings": size(plan.full_cache_bytes),
        f"fits {plan.device or 'the device'}": _fit(plan),
        **(
            {"experts read per MoE layer and step": f"{plan.experts_read:.2f}"}
            if plan.experts_read
            else {}
        ),
        "read per decode step": size(plan.decode_read_bytes),
        "decode step": f"{plan.decode_flops / 1e9:,.1f} GFLOP",
        "decode step, bound": bound(plan.decode_ms),
        "prefill of one prompt": f"{plan.prefill_flops / 1e12:,.1f} TFLOP",
        "prefill, bound": bound(plan.prefill_ms),
    }
    if plan.gpus > 1:
        rows |= {
            "sums and gathers per decode step": f"{plan.collectives}",
            "sent to each other GPU per decode step": size(plan.collective_bytes),
        }
    if plan.tiles:
        rows |= {
            "vision tower": size(plan.vision_bytes),
            f"{plan.tiles} tiles": f"{plan.vision_flops / 1e12:,.1f} TFLOP",
            f"{plan.tiles} tiles, bound": bound(plan.vision_ms),
        }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _fit(plan: Plan) -> str:
    """Whether the model fits, and how many GPUs it needs where that is not one."""
    verdict = {None: "give --device", True: "yes", False: "no"}[plan.fits]
    least = plan.least_gpus
    if least is None or plan.gpus == least == 1:
        return verdict
    return f"{verdict}: needs {least} GPU{'s' if least > 1 else ''}"


def bench_table(rows: "Iterable[Timing]") -> None:
    """Lanes side by side."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    columns = ("engine", "open", "first token", "tokens/s", "bandwidth", "own memory", "peak")
    for column in columns:
        table.add_column(column, justify="left" if column == "engine" else "right")
    failed = list[str]()
    for row in rows:
        engine = " ".join(filter(None, (row.engine, row.preset, row.precision)))
        if row.error:
            failed += f"{engine}: {row.error}".split("\n")
            continue
        share = row.bandwidth_share
        table.add_row(
            engine,
            f"{row.open_s:.2f} s",
            f"{1e3 * row.first_token_s:.1f} ms",
            f"{row.decode_tokens_per_s:.1f}",
            "-" if share is None else f"{100 * share:.0f} %",
            size(row.anonymous_bytes),
            size(row.peak_bytes),
        )
    console.print(table)
    for line in failed:
        say(line)


def spec_table(specs: Iterable[ModelSpec]) -> None:
    """A row for each preset."""
    specs = list(specs)
    columns: dict[str, Callable[[ModelSpec], object]] = {
        "": lambda s: s.name,
        "provenance": lambda s: "HYPOTHETICAL" if s.provenance == "estimated" else s.provenance,
        "parameters": lambda s: f"{counts(s)['total']:,}",
        "active text": lambda s: f"{counts(s)['active_text']:,}",
        "layers x width": lambda s: f"{s.text.layers} x {s.text.dim}",
        "attention": lambda s: _attention(s.text),
        "experts": lambda s: _experts(s.text.experts),
        "context": lambda s: f"{s.text.max_positions:,}",
    }
    table = Table()
    for name in columns:
        table.add_column(name, justify="right" if name in ("parameters", "active text") else "left")
    for spec in specs:
        table.add_row(*(str(read(spec)) for read in columns.values()))
    console.print(table)
    say("attention: heads / kv heads x width, masks (L chunk, G all), positions (R RoPE, N none)")
    say("experts: chosen of all x width, + width of shared experts")
    for spec in specs:
        for note in spec.notes:
            say(f"{spec.name}: {note}")


def comparison_table(rows: Iterable[Claim]) -> None:
    """What an article says of models, beside what their configs say; errors are marked."""
    table = Table()
    for name in ("model", "what", "the article", "the config", ""):
        table.add_column(name, overflow="fold")
    wrong = 0
    for row in rows:
        known = row.read(PRESETS[row.preset])
        off = known != row.said
        wrong += off
        table.add_row(row.preset, row.what, row.said, known, "WRONG" if off else "")
    console.print(table)
    say(f"{wrong} claims are wrong; the presets' own sources are the published configs")


def _attention(text: TextSpec) -> str:
    if text.latent:
        return f"{text.heads}, latent {text.latent.kv_rank} + {text.latent.rope}"
    masks = f"{text.attention} of {text.kept}" if text.kept else text.attention
    return f"{text.heads} / {text.kv_heads} x {text.head_dim}, {masks}, {text.rope}"


def _experts(experts: Experts | None) -> str:
    if experts is None:
        return "none"
    shared = f" + {experts.shared_hidden}" if experts.shared_hidden else ""
    return f"{experts.top_k} of {experts.count} x {experts.hidden}{shared}"


def diff_table(left: str, right: str, rows: Iterable[tuple[str, Any, Any]]) -> None:
    """The fields in which two specs differ."""
    table = Table()
    for column in ("field", left, right):
        table.add_column(column, overflow="fold")
    for path, a, b in rows:
        table.add_row(path, str(a), str(b))
    console.print(table)
