"""Step merge: the records of a partition in the order of the shards, the first of each key."""

from typing import Any

import pyarrow as pa
import pyarrow.ipc

from data_pipeline.job import Counts
from data_pipeline.shardset import write_table
from data_pipeline.steps import ROW_GROUP, Work, write_dropped


def merge(work: Work, tasks: int, partition: int) -> Counts:
    """All records of a partition in the order of the shards, the first of each key."""
    table = pa.concat_tables([_part(work, task, partition) for task in range(tasks)])
    table = table.sort_by([(name, "ascending") for name in ("order", "task", "row")]).combine_chunks()
    orders = table["order"].to_pylist()
    first = [position == 0 or order != orders[position - 1] for position, order in enumerate(orders)]
    unique = table.filter(pa.array(first, pa.bool_()))
    write_table(work.table("unique", partition), unique, ROW_GROUP)
    others = table.filter(pa.array([not value for value in first], pa.bool_()))
    dropped: list[dict[str, Any]] = [
        {"key": row["key"], "reason": "duplicate_key", "detail": None, "source": row["source"]}
        for row in others.select(["key", "source"]).to_pylist()
    ]
    write_dropped(work.table("dropped_merge", partition), dropped)
    return {"dropped": {"duplicate_key": len(dropped)}}


def _part(work: Work, task: int, partition: int) -> pa.Table:
    with pa.OSFile(str(work.records(task))) as file, pa.ipc.open_file(file) as batches:
        return pa.Table.from_batches([batches.get_batch(partition)])
