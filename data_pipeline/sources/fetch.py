"""Pictures that lie in files of their own, some at a time where each costs a journey."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from data_pipeline.errors import DataError
from data_pipeline.sources.location import Reading, TooLargeError, local, read_at
from data_pipeline.sources.pieces import BATCH_ROWS

AT_ONCE: Final = 16  # requests under way, of one process; ours


def image(url: str, limit: int, reading: Reading) -> dict[str, Any]:
    """The field `image` or `problem`. What is not there is a problem of its record; a store that fails ends the build,
    since the next build would find the picture."""
    try:
        return {"image": read_at(url, limit, reading)}
    except TooLargeError:
        return {"problem": "too_many_bytes"}
    except FileNotFoundError:
        return {"problem": "missing_file"}
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return {"problem": "unreadable_file"}
    except DataError as error:
        raise DataError(f"cannot read {url}: {error}") from None


def in_order(row: Callable[[int], dict[str, Any]], numbers: Sequence[int], example: str) -> Iterator[dict[str, Any]]:
    """Rows in order; fetched side by side when they do not lie on this machine."""
    if local(example) is not None:
        yield from map(row, numbers)
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, len(numbers), BATCH_ROWS):
            yield from pool.map(row, numbers[start : start + BATCH_ROWS])
