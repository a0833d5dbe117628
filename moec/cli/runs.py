"""Commands that run an artefact: generate and bench."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moec.cli.given import check_given
from moec.cli.options import Device, Gpus, Json, TrustEngines, WeightsFrom
from moec.cli.output import error_line, note_cpu, print_json, write
from moec.spec.errors import refuse


def generate(
    artefact: Annotated[Path, typer.Argument(help="The artefact's folder.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    ids: Annotated[
        str | None, typer.Option(help="Token ids to continue instead of text, such as 1,2,3.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image file. Repeat the option for more images.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Send the prompt as a user's message, by the template. Without a prompt: have a "
            "conversation, with a message in each line of stdin.",
        ),
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="A system message before all others; implies --chat.")
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file of messages to answer in place of a prompt: a list of "
            '{"role", "content"}, or an object with "messages" and "tools".'
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The most tokens to add to the prompt.")
    ] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="The sampling temperature; 0 takes the likeliest token. Default: as the "
            "checkpoint's generation_config.json says."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from the k likeliest tokens only.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the likeliest tokens that reach this probability only."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of the sampling.")] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="The factor by which tokens of the prompt and the text so far become less likely; "
            "1 changes nothing. Default: as the checkpoint's generation_config.json says."
        ),
    ] = None,
    mtp: Annotated[
        bool,
        typer.Option(
            "--mtp",
            help="Let the layer of multi-token prediction draft tokens; the artefact must have "
            "been built with --mtp. The tokens are the same but for rounding.",
        ),
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            help="What runs it: onnxruntime, onnxruntime-cuda, torch, tensorrt, interpreter or "
            "eager. Default: the engine of the artefact's target."
        ),
    ] = None,
    session_options: Annotated[
        str,
        typer.Option(
            help="Settings of ONNX Runtime: lean (weights stay mapped from their files) or fast "
            "(weights are copied and prepacked)."
        ),
    ] = "lean",
    device: Device = "cpu",
    gpus: Gpus = None,
    weights_from: WeightsFrom = None,
    trust_engines: TrustEngines = False,
) -> None:
    """Continue a prompt of text and images, and print each token as it comes.

    `<|image|>` in the prompt marks where an image belongs.
    If the prompt has no mark, the images come first.
    In a file of messages, parts `{"type": "image"}` are the images, in their order;
    `"path"` in such a part names a file in the folder of the file of messages.
    In a conversation, a line `/image FILE` gives an image for the next message,
    and the images of `--image` belong to the first.
    Control characters in the text are made visible on a terminal;
    a file or a pipe gets the text as it is.
    """
    given = [each for each in (prompt, ids, messages) if each is not None]
    talks = not given and (chat or system is not None)
    if len(given) != 1 and not talks:
        found = "more than one of them" if given else "none of them"
        wanted = "one of --prompt, --messages and --ids, or --chat for a conversation"
        refuse("generate", found, wanted, "give one of them, such as --prompt TEXT")
    if image and ids is not None:
        refuse("generate", "--image with --ids", "images with a text", "use --prompt TEXT")
    if system is not None and prompt is None and not talks:
        refuse("generate", "--system without --prompt", "both", "add --prompt TEXT")
    if talks and mtp:
        refuse("generate", "--mtp in a conversation", "a single answer", "leave --mtp out")
    check_given(artefact, weights_from=weights_from)
    import moec
    from moec.artefact.artefact import open_artefact
    from moec.cli.talks import converse
    from moec.runtime.inputs.chat import read_messages
    from moec.runtime.inputs.prompt import compose
    from moec.runtime.inputs.text import open_text
    from moec.spec.hf.generation import unapplied

    stream: Any = None
    row, pixels = [], None
    if ids is not None:
        row = _numbers(ids)
    elif not talks:
        opened = open_artefact(artefact, weights_from)
        text = open_text(opened)
        said, tools = read_messages(messages) if messages else (prompt or "", None)
        composed = compose(
            text, opened.manifest.spec, said, image or (), chat, tools, system=system
        )
        row, pixels = composed.input_ids, composed.pixel_values
        for note in composed.notes:
            error_line(f"note: {note}")
        stream = text.stream()
        next(stream)

    def show(step: list[int | None]) -> None:
        token = step[0]
        if token is not None:
            write(stream.send(token) if stream else f"{token} ")

    note_cpu(device, gpus)
    session = moec.open_session(
        artefact,
        device,
        engine=engine,
        session_options=session_options,
        weights_from=weights_from,
        trust_engines=trust_engines,
        gpus=gpus,
    )
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
    }
    for note in unapplied(session.spec.notes):
        error_line(f"note: {note}")
    if talks:
        converse(session.conversation(system=system), image or (), **settings)
        return
    if prompt and not chat and system is None:
        write(prompt)
    session.generate([row], pixels, stream=show, mtp=mtp, **settings)
    write("\n")


def bench(
    artefact: Annotated[Path, typer.Argument(help="The artefact's folder.")],
    batch: Annotated[int, typer.Option(min=1, help="The number of sequences.")] = 1,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="The prompt tokens of each sequence.")
    ] = 64,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="The tokens to add to each sequence.")
    ] = 32,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often to time each engine; the medians are printed.")
    ] = 3,
    device: Device = "cpu",
    weights_from: WeightsFrom = None,
    trust_engines: TrustEngines = False,
    as_json: Json = False,
) -> None:
    """Time opening, first token and decode, beside transformers if it is installed.

    It times the artefact's engine (ONNX Runtime with each set of options),
    the eager reference, and transformers, eager and compiled.
    Each runs in a process of its own, and they take turns.
    The exit code is 1 if the artefact's own engine fails.
    """
    check_given(artefact, weights_from=weights_from)
    import moec
    from moec.cli.tables import bench_table

    rows = moec.bench(
        artefact,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=device,
        rounds=rounds,
        weights_from=weights_from,
        trust_engines=trust_engines,
    )
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        bench_table(rows)
    if all(row.error for row in rows if row.engine == rows[0].engine):
        raise typer.Exit(1)


def _numbers(ids: str) -> list[int]:
    try:
        return [int(part) for part in ids.split(",")]
    except ValueError:
        refuse(f"--ids {ids}", "not integers", "1,2,3", "correct --ids")
