"""Where the command begins: it sees to interrupts before anything else is imported, and keeps the exit code."""

import sys

from mimicut.base.interrupts import ignore_interrupts, raise_interrupts
from mimicut.cli.printing import INTERRUPTED, say


def main() -> None:
    """Run the command line, and end the process."""
    code: int | str | None = INTERRUPTED
    try:
        raise_interrupts()
        from mimicut.cli.app import main as run

        run()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:  # before the command took over, or once more while it ended
        say("mimicut: interrupted")
    ignore_interrupts()
    sys.exit(code)
