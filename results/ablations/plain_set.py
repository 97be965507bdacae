"""Talking mouths in which nothing but what is said tells clips apart: one person, filmed once and for all.

python plain_set.py OUT
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from avppc.synth import clip, config, dataset
from avppc.synth.config import SynthConfig

render = clip.render


def render_alike(trajectory, face, rng, level):
    """Light, skin, background, lips, pose, camera and its noise as in every other clip."""
    return render(trajectory, face, np.random.default_rng(0), level)


# Here and not below: the worker processes import this file, too.
clip.render = render_alike
config.DIFFICULTIES["medium"] = replace(config.DIFFICULTIES["medium"], identity=0.0)

if __name__ == "__main__":
    dataset.run(SynthConfig(Path(sys.argv[1]), split_by="", train_speakers=1, val_speakers=1, test_speakers=1))
