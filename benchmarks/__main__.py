"""`python -m benchmarks`: the speed figures, as text and as one JSON."""

import argparse
from pathlib import Path

import torch

from benchmarks.suite import BENCHMARKS, RESULTS, run


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    parser.add_argument("--output", type=Path, default=RESULTS / "latest.json", help="the JSON file to write")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"unknown benchmarks {', '.join(sorted(unknown))}: known are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(options.threads)
    names = options.names or list(BENCHMARKS)
    run(names, quick=options.quick, device=torch.device(options.device), output=options.output)


if __name__ == "__main__":
    main()
