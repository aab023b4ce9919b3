"""`python workers/__main__.py NAME`: serves the rival of that name."""

import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    # The folder above, last: nothing in it may stand in for a package of the rival's environment.
    sys.path.pop(0)
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import_module(f"workers.{sys.argv[1]}_worker").main()
