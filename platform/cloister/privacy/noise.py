"""Gaussian noise for DP-SGD from a cryptographic stream.

Guarantees: samples are N(0, std²) up to float64, drawn from ChaCha20 under a key nobody else has; two calls never
share randomness. Each value is the sum of four independent Box-Muller values over two, so that the float that is
released does not betray the uniform words behind it (Holohan and Braghin, "Secure Random Sampling in Differential
Privacy", ESORICS 2021; the construction of Opacus's secure mode, which can no longer be turned on).

Not promised: the exact discrete Gaussian. The remedy makes inversion infeasible; it is not a proof about floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from cloister.privacy.keystream import Keystream

# Number of Gaussians summed into one; Holohan and Braghin section 4 with n = 2.
_SUMMANDS = 4


class GaussianNoise:
    """One rank's noise for one attempt. Samples are float64 so that adding them loses as little as possible."""

    def __init__(self, key: bytes) -> None:
        self._stream = Keystream(key)

    def sample(self, shape: Sequence[int], std: float) -> torch.Tensor:
        """Fresh independent N(0, std²) values.

        Raises:
            ValueError: `std` is negative or not finite.
        """
        if not (math.isfinite(std) and std >= 0.0):
            raise ValueError("a standard deviation is finite and not negative")
        count = math.prod(shape)
        half = (count + 1) // 2
        words = self._stream.words(2 * _SUMMANDS * half).reshape(2, _SUMMANDS, half)
        # 53 random bits each: radius_u in (0, 1] so that its logarithm is finite, angle_u in [0, 1).
        radius_u = ((words[0] >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
        angle_u = (words[1] >> np.uint64(11)).astype(np.float64) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(radius_u))
        angle = 2.0 * math.pi * angle_u
        gaussians = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        summed = gaussians.sum(axis=0)[:count] * (std / math.sqrt(_SUMMANDS))
        return torch.from_numpy(summed.reshape(tuple(shape)))
