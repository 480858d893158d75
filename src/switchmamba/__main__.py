"""``python -m switchmamba`` is the command ``switchmamba``."""

import sys

from switchmamba.cli import main

if __name__ == "__main__":
    sys.exit(main())
