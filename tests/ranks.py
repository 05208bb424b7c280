"""Functions of a test module run on several real ranks over gloo, as `maws/train.py` would find itself started.

values = run_ranks("test_momentum", "average_on_shards", tmp_path)  # [what rank 0 returned, what rank 1 did]
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from maws.dist import free_port

TESTS = Path(__file__).resolve().parent
START = """
import importlib, json, sys
sys.path[:0] = [{maws!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from maws import dist
world = dist.detect()
module = importlib.import_module({module!r})
value = getattr(module, {function!r})(**json.loads({arguments!r}))
with open({out!r} + "/rank_%d.json" % world.rank, "w") as f:
    json.dump(value, f)
if dist.initialised():
    dist.barrier()
    torch.distributed.destroy_process_group()
"""


def run_ranks(
    module: str, function: str, folder: Path, ranks: int = 2, seconds: float = 170, **arguments: Any
) -> list[Any]:
    """Call `module.function(**arguments)` of tests/maws on every rank; what each returned, by rank.

    Arguments and results travel as JSON. The function joins the group itself, through `maws.engine.Runtime` or
    `torch.distributed`. Fails with what the ranks printed when one of them does.
    """
    code = START.format(
        maws=str(TESTS / "maws"), tests=str(TESTS), module=module, function=function, out=str(folder),
        arguments=json.dumps(arguments),
    )  # fmt: skip
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"},
            cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for r in range(ranks)
    ]  # fmt: skip
    try:
        printed = [p.communicate(timeout=seconds)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    assert [p.returncode for p in started] == [0] * ranks, "\n".join(printed)
    return [json.loads((folder / f"rank_{r}.json").read_text()) for r in range(ranks)]
