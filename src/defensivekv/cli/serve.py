"""`defensivekv serve`."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from defensivekv.errors import InvalidInputError
from defensivekv.integrations.vllm.options import KEY, Options
from defensivekv.integrations.vllm.versions import check_version
from defensivekv.needleworld import demo_model

ADDITIONAL = "--additional-config"
_CONFIG_FILE = "--config"


def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Local folder or hub name; the packaged model if left out.")
    ] = None,
    policy: Annotated[str, typer.Option(help="See `defensivekv policies`.")] = "defensivekv",
    budget: Annotated[
        str | None, typer.Option(help="What to keep: 0.2 (the default), 20%, 1024 (entries per head).")
    ] = None,
    window_size: Annotated[int | None, typer.Option(min=1, help="Tokens of the observation window.")] = None,
    head_groups: Annotated[
        int, typer.Option(min=1, help="Groups of a layer's heads that share a budget each; ranks hold whole groups.")
    ] = 1,
) -> None:
    """Serve a model by vLLM, from evicted caches: `vllm serve` with our option; all other options are vLLM's.

    The model comes first, before any option of vLLM's.
    """
    if budget is not None and not budget.strip():
        raise InvalidInputError("the budget is empty: give 0.2, 20% or 1024, or leave it out")
    asked: dict[str, Any] = {
        "policy": policy,
        "budget": budget or (None if policy == "full" else "0.2"),
        "window_size": window_size,
        "head_groups": head_groups,
    }
    options = {name: value for name, value in asked.items() if value is not None}
    Options.parse(options)
    # A name that begins with a dash is an option of vLLM's.
    is_named = model is not None and not model.startswith("-")
    rest = [*([] if is_named or model is None else [model]), *context.args]
    if find_spec("vllm") is None:
        raise InvalidInputError("vLLM is not installed: pip install 'defensivekv[vllm]'")
    check_version()
    command = serve_command(model if is_named and model else demo_model(), options, rest)
    os.execv(sys.executable, [sys.executable, *command])


def serve_command(model: str, options: dict[str, Any], rest: list[str]) -> list[str]:
    """Arguments of the Python that serves. rest: options of vLLM's, whose additional configuration is added to."""
    given: dict[str, Any] = {}
    others: list[str] = []
    arguments = iter(rest)
    for argument in arguments:
        name, sign, value = argument.partition("=")
        spelled = name.replace("_", "-")
        if spelled == _CONFIG_FILE:
            path = value if sign else next(arguments, "")
            _check_file(Path(path))
            others += [_CONFIG_FILE, path]
            continue
        if spelled != ADDITIONAL:
            # vLLM takes parts of names, and names of single values, for the whole.
            if spelled.startswith(f"{ADDITIONAL}.") or (len(spelled) > 3 and ADDITIONAL.startswith(spelled)):
                raise InvalidInputError(
                    f"{name} would take the place of this command's options: give {ADDITIONAL} JSON"
                )
            others.append(argument)
            continue
        try:
            read = json.loads(value if sign else next(arguments, ""))
        except json.JSONDecodeError as error:
            raise InvalidInputError(f"{ADDITIONAL} is not JSON: {error}") from None
        if not isinstance(read, dict) or KEY in read:
            raise InvalidInputError(f"{ADDITIONAL} must be an object without {KEY!r}, which this command's options say")
        given.update(read)
    additional = json.dumps({**given, KEY: options})
    return ["-m", "vllm.entrypoints.cli.main", "serve", model, ADDITIONAL, additional, *others]


def _check_file(path: Path) -> None:
    """Raises InvalidInputError for a file of vLLM's options that this command's would take the place of."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        # vLLM says what is wrong with it.
        return
    names = [str(name) for name in read] if isinstance(read, dict) else []
    if any(f"--{name}".replace("_", "-").startswith(ADDITIONAL) for name in names):
        raise InvalidInputError(
            f"{str(path)!r} has an additional-config, which this command would replace: give it as {ADDITIONAL} JSON"
        )
