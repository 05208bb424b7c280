"""Names for the outputs of a released classifier, from the vocabulary beside it."""

import pyarrow as pa
import pyarrow.parquet as pq

from maws.checkpoint import CheckpointError
from maws.release import Release


def label_names(release: Release, outputs: int) -> list[str]:
    """The synset of each output; LABEL_0, LABEL_1 … where the release does not say what they are.

    Raises CheckpointError for a vocabulary that is damaged or of another head.
    """
    file = release.folder / "vocabulary.parquet"
    if not file.is_file():
        return [f"LABEL_{i}" for i in range(outputs)]
    try:
        table = pq.read_table(file, columns=["index", "synset"]).sort_by("index")
    except (OSError, KeyError, pa.ArrowException) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if table["index"].to_pylist() != list(range(outputs)):
        raise CheckpointError(f"{file} names {table.num_rows} outputs, and the head has {outputs}")
    return table["synset"].to_pylist()
