"""A job of a sweep, or one of the processes of `--devices`: the command line in a process that ends at once when the
process that waits for it is no more.

`python -m mimicut.cli.job_process compress ...`: standard input is a pipe that the waiting process holds open. Without
this, a job whose waiting process was killed would go on beside its own second start, in the same folder.
"""

import os
import threading

from mimicut.cli.start import main


def _end_with_the_pipe() -> None:
    os.read(0, 1)  # returns when the other end is closed, and nothing is ever written there
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_pipe, daemon=True).start()
    main()
