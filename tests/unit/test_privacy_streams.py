"""Sampling is exactly Poisson, noise is Gaussian, and no random word is used twice."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from cloister.privacy.keystream import Keystream, derive_key, fresh_secret
from cloister.privacy.noise import GaussianNoise
from cloister.privacy.sampling import PoissonSampler

# Statistics below use fixed keys, so they either always pass or never do.
KEY = bytes(range(32))


def test_words_are_the_chacha20_keystream_of_rfc_8439() -> None:
    zeros = Cipher(ChaCha20(KEY, bytes(16)), mode=None).encryptor().update(bytes(64))
    assert Keystream(KEY).words(8).astype("<u8").tobytes() == zeros


def test_a_stream_never_repeats_itself() -> None:
    stream = Keystream(KEY)
    words = np.concatenate([stream.words(1000) for _ in range(50)])
    assert len(np.unique(words)) == len(words)


def test_a_stream_can_be_neither_copied_nor_pickled_nor_printed() -> None:
    stream = Keystream(KEY)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="never"):
            attempt(stream)
    assert KEY.hex() not in repr(stream)
    assert repr(KEY) not in repr(stream)


def test_every_part_of_a_streams_name_changes_its_key() -> None:
    secret = fresh_secret()
    names = [
        {"purpose": purpose, "run": run, "attempt": attempt, "rank": rank}
        for purpose in ("noise", "sampling") for run in ("a", "b") for attempt in (1, 2) for rank in (0, 1)
    ]  # fmt: skip
    keys = {derive_key(secret, **name) for name in names}  # type: ignore[arg-type]  # values of two types
    assert len(keys) == 16
    assert derive_key(fresh_secret(), purpose="noise", run="a", attempt=1, rank=0) not in keys
    with pytest.raises(ValueError, match="32 bytes"):
        derive_key(b"short", purpose="noise", run="a", attempt=1, rank=0)


def test_inclusion_is_independent_and_at_the_stated_rate() -> None:
    n, rate, steps = 2000, 0.05, 2000
    sampler = PoissonSampler(n, rate, KEY)
    included = np.zeros((steps, n), dtype=bool)
    for step in range(steps):
        included[step, sampler.next_batch()] = True
    deviation = math.sqrt(rate * (1 - rate))
    assert abs(included.mean() - rate) < 4 * deviation / math.sqrt(n * steps)
    per_row = (included.mean(axis=0) - rate) / (deviation / math.sqrt(steps))
    assert np.abs(per_row).max() < 5
    # Batch sizes vary like a binomial: shuffling would give variance 0.
    sizes = included.sum(axis=1)
    assert 0.9 < sizes.var() / (n * rate * (1 - rate)) < 1.1
    # Neighbouring rows and neighbouring steps are uncorrelated.
    centred = included - rate
    for product in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(product.mean()) < 4 * deviation**2 / math.sqrt(product.size)


def test_empty_batches_are_steps_and_are_not_dropped() -> None:
    sampler = PoissonSampler(10, 0.02, KEY)
    sizes = [len(sampler.next_batch()) for _ in range(2000)]
    expected = 0.98**10
    assert abs(sizes.count(0) / 2000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 2000)
    assert PoissonSampler(0, 0.5, KEY).next_batch().tolist() == []


def test_the_sample_rate_is_never_exceeded() -> None:
    assert PoissonSampler(5, 1.0, KEY).next_batch().tolist() == [0, 1, 2, 3, 4]
    for rate in (0.1, 1 / 3, 1e-9, math.nextafter(1.0, 0.0)):
        threshold = PoissonSampler(1, rate, KEY)._threshold
        numerator, denominator = rate.as_integer_ratio()
        assert threshold * denominator <= numerator * 2**64 < (threshold + 1) * denominator
    for rate in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="sample rate"):
            PoissonSampler(5, rate, KEY)


def test_noise_has_the_moments_and_tails_of_a_gaussian() -> None:
    std, count = 3.0, 400_000
    z = GaussianNoise(KEY).sample((count,), std).numpy() / std
    assert abs(z.mean()) < 4 / math.sqrt(count)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / count)
    grid = np.linspace(-3.5, 3.5, 50)
    exact = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in grid])
    empirical = np.searchsorted(np.sort(z), grid) / count
    assert np.abs(empirical - exact).max() < 2.0 / math.sqrt(count)  # Kolmogorov-Smirnov, far tail


def test_the_two_halves_of_a_sample_and_two_samples_are_uncorrelated() -> None:
    noise = GaussianNoise(KEY)
    first, second = noise.sample((100_000,), 1.0).numpy(), noise.sample((100_000,), 1.0).numpy()
    for a, b in ((first[:50_000], first[50_000:]), (first, second), (first**2 - 1, second**2 - 1)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))


def test_noise_streams_of_two_ranks_and_two_attempts_differ() -> None:
    secret = fresh_secret()
    samples = [
        GaussianNoise(derive_key(secret, purpose="noise", run="r", attempt=attempt, rank=rank)).sample((8,), 1.0)
        for attempt, rank in ((1, 0), (1, 1), (2, 0))
    ]
    assert not any(torch.equal(samples[i], samples[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_noise_keeps_the_shape_and_refuses_a_bad_deviation() -> None:
    noise = GaussianNoise(KEY)
    assert noise.sample((3, 5), 1.0).shape == (3, 5)
    assert noise.sample((0,), 1.0).shape == (0,)
    assert noise.sample((7,), 0.0).abs().max() == 0.0
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="standard deviation"):
            noise.sample((1,), std)
