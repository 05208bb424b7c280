"""Which samples each step really had, written by every rank while it trains: RUN/keys/rank_00000.jsonl (`log.keys`)."""

import json
from pathlib import Path

from maws import dist


class KeyLog:
    """One line a step: {"step": 12, "keys": [...]}; lines after the step a run resumes from are dropped."""

    def __init__(self, run: Path, start: int) -> None:
        folder = run / "keys"
        if dist.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("rank_*.jsonl"):
                kept = [line for line in path.read_text().splitlines() if line.endswith("}")]
                kept = [line for line in kept if json.loads(line)["step"] < start]
                path.write_text("".join(line + "\n" for line in kept))
        dist.barrier()
        self._file = (folder / f"rank_{dist.rank():05}.jsonl").open("a", buffering=1)

    def write(self, step: int, keys: list[str]) -> None:
        self._file.write(json.dumps({"step": step, "keys": keys}) + "\n")

    def close(self) -> None:
        self._file.close()
