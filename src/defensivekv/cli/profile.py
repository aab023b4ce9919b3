"""`defensivekv profile`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from defensivekv.cli.documents import read_document
from defensivekv.errors import InvalidInputError


def profile(
    model: Annotated[
        str | None, typer.Argument(help="Local folder or hub name; the packaged model if left out.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text file to measure on; give the option again for more.")
    ] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("profile.json"),
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that a streaming head holds.")] = 64,
    recent: Annotated[int, typer.Option(min=1, help="Latest tokens that a streaming head holds.")] = 256,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")
    ] = False,
) -> None:
    """Measure which heads retrieve and which only stream, for the policy duo-attention."""
    console = Console()
    if not text and model is not None:
        raise InvalidInputError("no text: give --text FILE at least once, of more tokens than a streaming head holds")
    if not output.parent.is_dir():
        raise InvalidInputError(f"cannot write {output}: there is no folder {output.parent}")
    texts = [read_document(source) for source in text or ()]

    from defensivekv.cli.models import load_model
    from defensivekv.integrations.transformers.profiling import make_profile
    from defensivekv.needleworld import make_sample

    loaded, tokenizer = load_model(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, console=console
    )
    if not texts:
        texts = [make_sample("multi_key", num_tokens=1024, seed=seed).document for seed in range(8)]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading", total=len(texts))
        made = make_profile(
            loaded, tokenizer, texts, num_sinks=sinks, num_recent=recent, advance=lambda: progress.advance(task)
        )
    made.save(output)
    for index, layer in enumerate(made.heads):
        console.print(f"layer {index:3d}   {'  '.join(f'{share:.3f}' for share in layer)}", highlight=False)
    console.print(f"profile     {output}: use it with policy duo-attention, profile={output}", highlight=False)
