"""The command line's entry point: `fedmomentum`, or `python -m fedmomentum`."""

from __future__ import annotations

import sys


def main() -> None:
    """Load and run the command line; Ctrl-C during loading exits like Ctrl-C later."""
    try:
        from fedmomentum.cli import main as cli
    except KeyboardInterrupt:
        print("fedmomentum: interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
