"""The figures of the method's authors, which the table shows beside its own."""

from __future__ import annotations

SOURCE = (
    "Tellamekala, Valstar, Pound, Giesbrecht: Audio-Visual Predictive Coding for Self-Supervised Visual Representation "
    "Learning, ICPR 2020, slides: word classification rate on LRW (500 words, all labels), encoder frozen (fine-tuned)."
)
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "synchronization": {"tconv": (0.5070, 0.7417), "gru": (0.5526, 0.7692)},
    "time-arrow": {"tconv": (0.5242, 0.7580), "gru": (0.5988, 0.7826)},
    "correspondence": {"tconv": (0.5622, 0.7423), "gru": (0.6190, 0.7790)},
    "visual-permutative": {"tconv": (0.6077, 0.7795), "gru": (0.6762, 0.8176)},
    "av-permutative": {"tconv": (0.7647, 0.8044), "gru": (0.8030, 0.8316)},
}
"""By proxy task and head: (frozen, fine-tuned), 0 to 1."""
