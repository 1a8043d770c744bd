"""The door, as `mpillm` and as `python -m mpillm`: signals first, for the imports take a second."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from mpillm.system.ending_signals import exit_by_code, leave_on_signals

        leave_on_signals()
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        from mpillm.cli import main as run
    except Exception as failure:
        from mpillm.system.shadowing import explain_hidden, hidden_packages

        hidden, remedy = explain_hidden(hidden_packages())
        if not hidden:
            raise
        sys.exit(f"mpillm: error: {hidden} ({type(failure).__name__}: {failure}); {remedy}")
    try:
        try:
            run()
        finally:
            # What comes from now on ends the process without a word.
            leave_on_signals()
            exit_by_code()
    except KeyboardInterrupt:
        # It came between the end of the verb and that.
        sys.exit(130)


if __name__ == "__main__":
    main()
