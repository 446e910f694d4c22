"""The `enhancer` command, also `python -m enhancer`.

The command line's own imports are inside `main`, so that Ctrl-C while they load ends without a traceback.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Loads the command line and runs it."""
    try:
        from enhancer.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
