"""Advantages: how much better a sample is than the others of its group. G samples of one group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_mega.recipe.blocks import AdvantageBlock


def group_advantages(rewards_G: np.ndarray | Sequence[float], block: AdvantageBlock) -> np.ndarray:
    """A_i = (r_i - mean(r)) / (std(r) + epsilon), in float64; normalize_std off: no division (Dr.GRPO).

    std is the population's, sqrt(mean((r - mean)^2)): the group is all there is to normalise, not a sample of
    something larger, and a normalised group then has mean square 1 (up to epsilon) whatever its size.
    Libraries that divide by G - 1 get advantages smaller by sqrt((G - 1) / G): 6% at G = 8.

    Equal rewards give exactly 0, where rounding in the mean would leave noise for the division to magnify.
    """
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    assert rewards_G.ndim == 1 and rewards_G.size >= 1, rewards_G.shape
    assert np.isfinite(rewards_G).all(), rewards_G
    if (rewards_G == rewards_G[0]).all():
        return np.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    if not block.normalize_std:
        return centred_G
    return centred_G / (np.sqrt(np.mean(centred_G**2)) + block.epsilon)
