"""How a command ends: its errors as one line, its exit code, and at once."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Final, NoReturn

from data_pipeline.errors import DataError, UserError

INTERRUPTED: Final = 130  # Ctrl-C


def told(command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code of a command; what went wrong, or that it was interrupted, is one line on stderr."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # disk full, no permission, …: the system's words and the file say it all
        print(f"error: {error}", file=sys.stderr)
        return DataError.exit_code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED


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
