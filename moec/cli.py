"""The command line: parses, calls the API, prints.

Exit codes: 0 done, 1 a check failed, 2 bad input, 3 a needed package or device is missing.
"""

import json
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from moec.spec.errors import MoecError, refuse

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile Llama 4 checkpoints to artefacts, and prove that they compute the same thing.",
)
specs = typer.Typer(no_args_is_help=True, help="List, show, compare and describe model specs.")
app.add_typer(specs, name="spec")
console = Console()

#: weights above this many bytes are proven on the twin unless somebody asks for more
PROVE_ON_WEIGHTS = 4 * 10**9

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Placement = Annotated[
    str | None,
    typer.Option(
        help="in-place (no copy), link (hard links beside the model), copy, or pack (rewritten "
        "once: for target ort as runs fastest, for fp8 quantised). Default in-place if it can be."
    ),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Scales = Annotated[
    Path | None, typer.Option(help="What calibrate wrote, for schemes with static scales.")
]


@app.command()
def build(
    variant: Annotated[str | None, typer.Option(help="A preset: see `spec list`.")] = None,
    spec: Annotated[Path | None, typer.Option(help="A spec file, .yaml or .json.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A checkpoint folder.")] = None,
    target: Annotated[
        str, typer.Option(help="onnx, ort, torch, tensorrt or tensorrt-rtx.")
    ] = "onnx",
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32 (default), fp16, bf16 (default for TensorRT); fp8 (default for fp8 weights, "
            "and all that target torch has); int8, int4."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The artefact's folder.")] = None,
    weights: Placement = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="How weights become fp8: meta (default), dynamic (default for torch), mixed "
            "(default for tensorrt), static (default for tensorrt-rtx), modelopt, deepseek, or a "
            ".yaml or .json file."
        ),
    ] = None,
    scales: Scales = None,
    cache: Annotated[
        str | None, typer.Option(help="Keys and values: fp8 or wide; default as the scheme says.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Of an engine: tokens of a row at most, prompt included.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Of an engine: rows at most.")] = None,
    piece: Annotated[
        int | None, typer.Option(help="Of an engine: tokens of a prompt in one call at most.")
    ] = None,
    architectures: Annotated[
        list[str] | None,
        typer.Option(
            "--sm", help="Of tensorrt-rtx: SM89, SM120, ...; may be given more than once."
        ),
    ] = None,
    bindings: Annotated[
        str | None,
        typer.Option(help="Weights that an engine takes instead of holding: experts, all or none."),
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine/--no-engine", help="Build engines, or their ONNX alone.")
    ] = True,
    check: Annotated[
        bool, typer.Option("--validate/--no-validate", help="Prove the numbers after the build.")
    ] = True,
) -> None:
    """Build an artefact from exactly one of --variant, --spec and --checkpoint, and prove it."""
    given = [source for source in (variant, spec, checkpoint) if source is not None]
    if len(given) != 1:
        refuse(
            "build",
            f"{len(given)} sources",
            "exactly one of --variant, --spec, --checkpoint",
            "moec build --variant scout",
        )
    _expect(variant, spec, checkpoint)
    import moec
    from moec.tables import artefact_tables, bar

    sizes: dict[str, Any] = {"context": context, "batch": batch, "piece": piece}
    sizes |= {"bindings": bindings, "architectures": architectures}
    chosen = {name: each for name, each in sizes.items() if each is not None}
    chosen |= {} if engine else {"build": False}
    with bar(console) as progress:
        art = moec.export(
            given[0],
            target,
            precision,
            out,
            weights=weights,
            progress=progress,
            scheme=scheme,
            scales=scales,
            cache=cache,
            options=_options(chosen),
        )
    artefact_tables(console, art)
    if check:
        size = sum(shard.size for shard in art.manifest.weights.shards.values())
        _prove(art.path, None, None, on_twin=size > PROVE_ON_WEIGHTS)


def _options(chosen: dict[str, Any]) -> Any:
    """Options of engines; None where nobody chose any."""
    if not chosen:
        return None
    from moec.artefact.engine_options import engine_options

    return engine_options(chosen)


@app.command()
def engine(
    artefact: Path,
    architectures: Annotated[
        list[str] | None,
        typer.Option("--sm", help="Of tensorrt-rtx: others than those that it was built for."),
    ] = None,
    trtexec: Annotated[
        bool, typer.Option("--trtexec", help="Print commands that do it without moec instead.")
    ] = False,
) -> None:
    """Build the engines of an artefact whose ONNX was built with --no-engine, or elsewhere."""
    import moec
    from moec.tables import artefact_tables, bar

    if trtexec:
        for line in moec.trtexec_commands(artefact):
            sys.stdout.write(f"{line}\n")
        return
    with bar(console) as progress:
        art = moec.build_engines(artefact, architectures=architectures or (), progress=progress)
    artefact_tables(console, art)


@app.command()
def bind(
    artefact: Path,
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint folder of the same model.")],
    out: Annotated[Path | None, typer.Option(help="Default: replace the artefact.")] = None,
    weights: Placement = None,
    scales: Scales = None,
    engine: Annotated[
        bool, typer.Option("--engine/--no-engine", help="Build engines anew if they must be.")
    ] = True,
) -> None:
    """Attach a checkpoint to an artefact that was built without one."""
    import moec
    from moec.tables import artefact_tables, bar

    with bar(console) as progress:
        art = moec.bind(
            artefact,
            checkpoint,
            out,
            weights=weights,
            progress=progress,
            scales=scales,
            engine=engine,
        )
    artefact_tables(console, art)


@app.command()
def calibrate(
    checkpoint: Path,
    tokens: Annotated[Path, typer.Option(help="Token ids, .npy or .json; or text, .txt.")],
    out: Annotated[Path, typer.Option(help="The file to write, .json.")],
    percentile: Annotated[
        float, typer.Option(help="Of the magnitudes at each site; 100 is the largest.")
    ] = 100.0,
) -> None:
    """Find static scales: how large inputs of products, keys and values get on some tokens."""
    import moec
    from moec.tables import bar

    if not out.absolute().parent.is_dir() or out.is_dir():
        refuse(
            f"--out {out}",
            "a folder, or in one that is not there",
            "a file to write",
            "choose another",
        )
    with bar(console) as progress:
        found = moec.calibrate(checkpoint, tokens, percentile=percentile, progress=progress)
    try:
        out.write_text(found.model_dump_json(indent=1), encoding="utf-8")
    except OSError as error:
        refuse(f"--out {out}", error.strerror, "a file that can be written", "choose another")
    sites = len(found.inputs) + len(found.caches)
    console.print(
        f"{out}: {sites} sites of {found.model} over {found.tokens:,} tokens", highlight=False
    )
    if found.unseen:
        console.print(
            f"warning: {len(found.unseen)} experts saw no token, and got the largest magnitude of "
            f"their layer: {', '.join(found.unseen[:8])}{', ...' if found.unseen[8:] else ''}",
            style="yellow",
            highlight=False,
        )


@app.command()
def validate(
    artefact: Path,
    tokens: Annotated[int | None, typer.Option(help="Length of the longest row.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the token draw; default fresh.")] = None,
    twin: Annotated[bool, typer.Option("--twin", help="Prove the twin, not the weights.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the report as a page.")] = None,
    device: Device = "cpu",
    reference: Annotated[
        str | None,
        typer.Option(
            help="Also say what the precision costs: bf16 (the weights that it was built "
            "from), or the folder of wide weights."
        ),
    ] = None,
    eval_file: Annotated[
        Path | None,
        typer.Option(
            "--eval", help="Tokens for that, as for calibrate; default drawn from the reference."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare an artefact with the eager reference, layer by layer; exit code 1 if it differs."""
    _prove(artefact, tokens, seed, twin, html, as_json, device, reference, eval_file)


@app.command()
def generate(
    artefact: Path,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids instead: 1,2,3.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image file; may be given more than once.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt as a user turn.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="onnxruntime, torch, tensorrt, interpreter or eager; default as the target has it."
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="lean or fast.")] = "lean",
    device: Device = "cpu",
) -> None:
    """Continue a prompt of text and images, streaming to the terminal.

    `<|image|>` in the text marks where an image belongs; without any, images come first.
    """
    if (prompt is None) == (ids is None):
        refuse("generate", "both or neither", "one of --prompt and --ids", "add --prompt TEXT")
    if image and prompt is None:
        refuse("generate", "--image with --ids", "images with a text", "use --prompt TEXT")
    import moec
    from moec.artefact.artefact import open_artefact
    from moec.runtime.inputs.prompt import compose
    from moec.runtime.inputs.text import open_text

    stream: Any = None
    row, pixels = [], None
    if prompt is None:
        row = _numbers(ids or "")
    else:
        opened = open_artefact(artefact)
        text = open_text(opened)
        composed = compose(text, opened.manifest.spec, prompt, image or (), chat)
        row, pixels = composed.input_ids, composed.pixel_values
        for note in composed.notes:
            Console(stderr=True).print(f"note: {note}", highlight=False, soft_wrap=True)
        stream = text.stream()
        next(stream)

    def show(step: list[int | None]) -> None:
        token = step[0]
        if token is not None:
            sys.stdout.write(stream.send(token) if stream else f"{token} ")
            sys.stdout.flush()

    session = moec.open_session(artefact, device, engine=engine, session_options=preset)
    if prompt and not chat:
        sys.stdout.write(prompt)
    session.generate(
        [row],
        pixels,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stream=show,
    )
    sys.stdout.write("\n")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A preset, spec file or checkpoint folder.")],
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, fp16, bf16 (default), fp8 (default for fp8 weights), int8, int4."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 8192,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    device: Annotated[str | None, typer.Option(help="For the roofline: h200.")] = None,
    tiles: Annotated[int, typer.Option(help="Image tiles in the prompts.")] = 0,
    scheme: Annotated[
        str | None,
        typer.Option(help="With fp8: dynamic (default), meta, modelopt, deepseek, FILE."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a model costs before anyone builds it."""
    import moec
    from moec.tables import plan_table

    result = moec.plan(
        model,
        precision,
        context=context,
        batch=batch,
        device=device,
        tiles=tiles,
        scheme=scheme,
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        plan_table(console, result)


@app.command()
def inspect(
    artefact: Path,
    verify: Annotated[bool, typer.Option("--verify", help="Hash the files again.")] = False,
    as_json: Json = False,
) -> None:
    """Show an artefact's manifest; with --verify, check every byte that the build wrote."""
    from moec.artefact.artefact import open_artefact, verify_files
    from moec.tables import artefact_tables, report_table

    art = open_artefact(artefact)
    if as_json:
        _print_json(art.manifest.model_dump(mode="json"))
    else:
        artefact_tables(console, art)
        if art.manifest.parity:
            report_table(console, art.manifest.parity)
    if verify:
        verify_files(art)
        console.print("verified: every file is as it was written")


@app.command()
def bench(
    artefact: Path,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Figures are medians over these.")] = 3,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time opening, first token and decode, beside transformers where it is installed.

    ONNX Runtime by preset, the eager reference, transformers eager and compiled: each in a process
    of its own, in turns.
    """
    import moec
    from moec.tables import bench_table

    rows = moec.bench(
        artefact,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=device,
        rounds=rounds,
    )
    if as_json:
        _print_json([row.to_dict() for row in rows])
    else:
        bench_table(console, rows)


@specs.command("list")
def spec_list() -> None:
    """The presets, side by side."""
    from moec.spec.presets import PRESETS
    from moec.tables import spec_table

    spec_table(console, PRESETS.values())


@specs.command("show")
def spec_show(
    model: str,
    form: Annotated[str, typer.Option("--format", help="yaml, json or config.")] = "yaml",
) -> None:
    """Print a preset, spec file or checkpoint as YAML, JSON or a Hugging Face config.json."""
    from moec.spec.files import dump_yaml, load_spec
    from moec.spec.hf.config_writer import write_config

    spec = load_spec(model)
    if form == "yaml":
        typer.echo(dump_yaml(spec), nl=False)
    elif form in ("json", "config"):
        _print_json(spec.model_dump(mode="json") if form == "json" else write_config(spec))
    else:
        refuse(f"--format {form}", form, "yaml, json or config", "choose one of them")


@specs.command("schema")
def spec_schema() -> None:
    """Print the JSON schema of spec files."""
    from moec.spec.model import ModelSpec

    _print_json(ModelSpec.model_json_schema())


@specs.command("diff")
def spec_diff(left: str, right: str) -> None:
    """Print the fields in which two specs differ; exit code 1 if there are any."""
    from moec.spec.files import diff, load_spec
    from moec.tables import diff_table

    rows = diff(load_spec(left), load_spec(right))
    if rows:
        diff_table(console, left, right, rows)
        raise typer.Exit(1)
    console.print("no difference")


def _prove(
    artefact: Path,
    tokens: int | None,
    seed: int | None,
    on_twin: bool = False,
    html: Path | None = None,
    as_json: bool = False,
    device: str = "cpu",
    reference: str | None = None,
    rows: Path | None = None,
) -> None:
    import moec
    from moec.runtime.proof.validate import record
    from moec.tables import bar, report_table

    with bar(console, quiet=as_json) as progress:
        report = moec.validate(
            artefact,
            tokens=tokens,
            seed=seed,
            reduced=on_twin,
            progress=progress,
            device=device,
            reference=reference,
            rows=rows,
        )
    record(artefact, report)
    if html:
        try:
            report.to_html(html)
        except OSError as error:
            refuse(f"--html {html}", error.strerror, "a file that can be written", "choose another")
    if as_json:
        _print_json(report.to_dict())
    else:
        report_table(console, report.to_dict())
    if not report.passed:
        raise typer.Exit(1)


def _expect(variant: str | None, spec: Path | None, checkpoint: Path | None) -> None:
    """Each source is of its own kind, so that a typo is not taken for another kind."""
    from moec.spec.presets import PRESETS

    if variant is not None and variant not in PRESETS:
        refuse(f"--variant {variant}", "no such preset", ", ".join(PRESETS), "moec spec list")
    if spec is not None and not spec.is_file():
        refuse(f"--spec {spec}", "no such file", "a spec file", "moec spec schema")
    if checkpoint is not None and not checkpoint.is_dir():
        refuse(
            f"--checkpoint {checkpoint}",
            "no such folder",
            "a folder with config.json",
            "check the path, or build without weights: moec build --variant scout",
        )


def _numbers(ids: str) -> list[int]:
    try:
        return [int(part) for part in ids.split(",")]
    except ValueError:
        refuse(f"--ids {ids}", "not integers", "1,2,3", "correct --ids")


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM; typer would give a KeyboardInterrupt its own message and exit code."""


def _stop(*_: object) -> NoReturn:
    raise _Stopped


def main() -> None:
    """Run the command line and exit; a user's mistake is a message, never a stack trace."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    # Of odd metadata in images, and large ones: what matters is an error.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        app()
    except MoecError as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        sys.exit(error.exit_code)
    except _Stopped:
        Console(stderr=True).print(
            "stopped: no half of an artefact is left behind; weights being packed are kept "
            "for the next build of the same --out",
            style="yellow",
            soft_wrap=True,
        )
        sys.exit(2)
