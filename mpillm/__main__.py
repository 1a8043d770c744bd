"""The door, as `mpillm` and as `python -m mpillm`: signals first, for the imports take a second."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from mpillm.system.ending_signals import leave_on_signals

        leave_on_signals()
    except KeyboardInterrupt:
        sys.exit(130)
    from mpillm.cli import main as run

    run()


if __name__ == "__main__":
    main()
