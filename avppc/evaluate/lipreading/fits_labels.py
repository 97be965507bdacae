"""Which clips are labelled: chosen by a seed, and the same for every encoder that is compared."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def check_words(data: str | os.PathLike[str], words: Sequence[str]) -> None:
    """ValueError where a data set has no words to tell apart.

    Args:
        data: the data set, for the text of the error.
        words: its words.
    """
    if not words:
        raise ValueError(
            f"{data} has no labels: lip reading is tested on words, which `avppc prepare` takes from folders "
            "VIDEOS/WORD/{train,val,test}. `avppc probe`, `embed` and `check-sync` need no labels"
        )
    if len(words) == 1:
        raise ValueError(f"{data} has one word only, {words[0]}: there is nothing to tell apart")


def draw_labelled_clips(labels: Tensor, per_word: int, seed: int, words: Sequence[str] = ()) -> Tensor:
    """Row numbers of the clips whose labels may be used: `per_word` of each word, 0: all; int64, ascending.

    Args:
        words: what the labels mean, for the text of an error.

    Raises:
        ValueError: a word has fewer clips, or fewer than two words have clips.
    """
    numbers = labels[labels >= 0].unique().tolist()
    if not numbers:
        raise ValueError("the training split has no labelled clips")
    if len(numbers) == 1:
        raise ValueError(f"the training split has clips of one word only, {_name(numbers[0], words)}: 2 are needed")
    rows = []
    for word in numbers:
        of_word = torch.where(labels == word)[0]
        if per_word > len(of_word):
            raise ValueError(
                f"labels_per_word is {per_word}, but {_name(word, words)} has {len(of_word)} training clips"
            )
        generator = np.random.default_rng([seed, word])
        chosen = generator.permutation(len(of_word))[: per_word or len(of_word)]
        rows.append(of_word[torch.from_numpy(chosen)])
    return torch.cat(rows).sort().values


def _name(word: int, words: Sequence[str]) -> str:
    return words[word] if word < len(words) else f"word number {word}"
