"""The harness's own command line, with the model type "defensivekv" known to it."""

import sys

from lm_eval.__main__ import cli_evaluate

import defensivekv.integrations.lm_eval  # noqa: F401  (registers the model type)
from defensivekv.errors import DefensiveKVError


def main() -> None:
    """Runs the harness; errors that were raised on purpose become one line and exit status 2."""
    try:
        cli_evaluate()
    except DefensiveKVError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
