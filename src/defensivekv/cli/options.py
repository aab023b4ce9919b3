"""Arguments and options that several commands take."""

from typing import Annotated

import typer

ModelName = Annotated[str | None, typer.Argument(help="Local folder or hub name; the packaged model if left out.")]
BudgetText = Annotated[
    str | None,
    typer.Option("--budget", help="What to keep: 0.2 (the default), 20%, 1024 (entries per head), 64MiB, auto:0.99."),
]
MaxEntries = Annotated[
    int | None, typer.Option(min=1, help="Entries per head that may ever be held, question and answer counted.")
]
ChunkSize = Annotated[
    int | None, typer.Option(min=1, help="Tokens of the document read at a time; all, or 512 under a bound.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
TemplateName = Annotated[str, typer.Option(help="auto, chat or plain.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")]
PolicyName = Annotated[str | None, typer.Option(help="See `defensivekv policies`; layer-defensivekv if left out.")]
StoreAddress = Annotated[
    str | None,
    typer.Option(
        envvar="DEFENSIVEKV_STORE",
        help="Folder, or address such as s3://bucket/contexts, where compressed documents are kept and found again.",
    ),
]
StoreBytes = Annotated[
    str | None,
    typer.Option(
        envvar="DEFENSIVEKV_STORE_MAX_BYTES", help="What the store may hold, such as 20GiB; the least recently used go."
    ),
]
