"""Texts through the text tower of a two-tower release, as unit vectors.

    vectors = embed(encode, ["a photo of a fox.", …])          # T E

Short texts go together, so that little of a batch is padding. Letters: T texts, E joint width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from eval.features import Encoder
from eval.progress import Progress
from maws.release import load_tokenizer

TEXTS = 256  # encoded at once


@torch.no_grad()
def embed(encode: Encoder, texts: Sequence[str]) -> Tensor:
    """Unit vectors, T E, in the order of the texts."""
    batches = list(embed_batches(encode, texts))
    found = torch.cat([vectors for _, vectors in batches])
    order = torch.cat([rows for rows, _ in batches])
    return torch.empty_like(found).index_copy_(0, order, found)


@torch.no_grad()
def embed_batches(encode: Encoder, texts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions of some texts and their unit vectors, until there has been every text once."""
    assert encode.release is not None
    tokenize, device = load_tokenizer(encode.release), encode.device
    order = sorted(range(len(texts)), key=lambda position: len(texts[position]))
    with Progress("texts", len(texts)) as progress:
        for start in range(0, len(order), TEXTS):
            rows = order[start : start + TEXTS]
            ids, mask = tokenize([texts[row] for row in rows])
            longest = int(mask.sum(dim=1).max())  # what follows is padding in every row
            ids, mask = ids[:, :longest].to(device), mask[:, :longest].to(device)
            vectors = encode.two_tower.encode_text(ids, mask).float()  # of length 1
            if not torch.isfinite(vectors).all():
                raise DataError("the text tower gives nan or infinity; its weights are damaged")
            progress.add(len(rows))
            yield torch.tensor(rows, device=device), vectors
