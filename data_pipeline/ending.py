"""How a command ends once its work is done: at once."""

import logging
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End the process with this exit code, without taking the interpreter down first.

    Arrow's threads are sometimes still at work then and abort the process: a command that had done everything would
    end with signal 6 (github.com/apache/arrow/issues/34314). For the last line of an entry point; files are closed and
    pools shut down by then.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # whoever read this is gone: `… | head`
            code = code or 1
    os._exit(code)
