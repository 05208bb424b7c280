"""Functions of a test module run on several real ranks over gloo, as `maws/train.py` would find itself started.

values = run_ranks("test_momentum", "average_on_shards", tmp_path)  # [what rank 0 returned, what rank 1 did]
"""

import importlib
import json
from pathlib import Path
from typing import Any

from training import Training


def call(module: str, function: str, arguments: dict[str, Any], out: str) -> int:
    """In a rank: the function's value goes to OUT/rank_N.json."""
    import torch

    from maws import dist

    torch.set_num_threads(1)
    world = dist.detect()
    value = getattr(importlib.import_module(module), function)(**arguments)
    (Path(out) / f"rank_{world.rank}.json").write_text(json.dumps(value))
    if dist.initialised():
        dist.barrier()
        torch.distributed.destroy_process_group()
    return 0


def run_ranks(
    module: str, function: str, folder: Path, ranks: int = 2, seconds: float = 170, **arguments: Any
) -> list[Any]:
    """Call `module.function(**arguments)` of tests/maws on every rank; what each returned, by rank.

    Arguments and results travel as JSON. The function joins the group itself, through `maws.engine.Runtime` or
    `torch.distributed`. Fails with what the ranks printed when one of them does.
    """
    codes, printed = Training([module, function, arguments, str(folder)], ranks, target="ranks:call").wait(seconds)
    assert codes == [0] * ranks, printed
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
