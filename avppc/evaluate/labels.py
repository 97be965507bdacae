"""Which clips are labelled: chosen by a seed, and the same for every encoder that is compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def draw_labelled_clips(labels: Tensor, per_word: int, seed: int, words: Sequence[str] = ()) -> Tensor:
    """Row numbers of the clips whose labels may be used: `per_word` of each word, 0: all; int64, ascending.

    Args:
        words: what the labels mean, for the text of an error.

    Raises:
        ValueError: a word has fewer clips, or no clip has a label.
    """
    numbers = labels[labels >= 0].unique().tolist()
    if not numbers:
        raise ValueError("the training split has no labelled clips")
    rows = []
    for word in numbers:
        of_word = torch.where(labels == word)[0]
        if per_word > len(of_word):
            name = words[word] if word < len(words) else f"word number {word}"
            raise ValueError(f"labels_per_word is {per_word}, but {name} has {len(of_word)} training clips")
        generator = np.random.default_rng([seed, word])
        chosen = generator.permutation(len(of_word))[: per_word or len(of_word)]
        rows.append(of_word[torch.from_numpy(chosen)])
    return torch.cat(rows).sort().values
