"""Sampling is exactly Poisson, noise is Gaussian, and no random word is used twice."""

from __future__ import annotations

import ast
import copy
import itertools
import math
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy.stats import binom, chi2

from cloister.errors import IntegrityError, UnavailableError
from cloister.privacy import noise as noise_module
from cloister.privacy.keystream import Keystream, derive_key, fresh_secret
from cloister.privacy.noise import CHUNK_VALUES, GaussianNoise, dither_bits
from cloister.privacy.sampling import PoissonSampler, binomial_boundaries

# Statistics below use fixed keys, so they either always pass or never do.
KEY = bytes(range(32))
UNIT = 2.0**-32
SOURCE = Path(__file__).resolve().parents[2] / "platform" / "cloister"


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
    choices: dict[str, tuple[object, ...]] = {
        "purpose": ("noise", "sampling"), "run": ("a", "b"), "attempt": (1, 2), "rank": (0, 1),
        "step": (None, 0, 1), "shard": (None, "", "0", "1"),
    }  # fmt: skip
    names = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    keys = {derive_key(secret, **name) for name in names}  # type: ignore[arg-type]  # values of two types
    assert len(keys) == len(names) == 192
    assert derive_key(fresh_secret(), purpose="noise", run="a", attempt=1, rank=0) not in keys
    with pytest.raises(ValueError, match="32 bytes"):
        derive_key(b"short", purpose="noise", run="a", attempt=1, rank=0)


class Scripted(Keystream):
    """Hands out the words that it was given instead of its own."""

    def __init__(self, words: list[int]) -> None:
        super().__init__(KEY)
        self.left = words

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        given, self.left = self.left[:count], self.left[count:]
        return np.array(given, dtype=np.uint64)


class Counting(Keystream):
    """Counts what is drawn from it."""

    drawn = 0

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        self.drawn += count
        return super().words(count)


def plausible(statistic: float, degrees: int) -> bool:
    """Whether a chi-square statistic lies in its central 99.8 %: neither too far from what is expected nor too near."""
    return bool(chi2.ppf(0.001, degrees) < statistic < chi2.ppf(0.999, degrees))


def goodness_of_fit(observed: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells that expect fewer than ten are one cell."""
    rare = expected < 10
    observed, expected = (np.append(cells[~rare], cells[rare].sum()) for cells in (observed, expected))
    kept = expected > 0
    return float(((observed - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1


BOTH_WAYS = pytest.mark.parametrize("way", ["_by_blocks", "_by_rows"])


@BOTH_WAYS
@pytest.mark.parametrize("n", [256, 300, 1])
def test_rows_are_included_independently_at_the_stated_rate(way: str, n: int) -> None:
    """A block has 256 rows at this rate: one whole block, one with a partial block after it, one row."""
    rate, steps = 0.05, 4000
    sampler = PoissonSampler(n, rate, KEY)
    included = np.zeros((steps, n), dtype=bool)
    for step in range(steps):
        batch = getattr(sampler, way)()
        assert batch.dtype == np.int64
        assert (np.diff(batch) > 0).all(), "ascending, and no row twice"
        included[step, batch] = True
    # 1. Each row at the rate, and batch sizes as a binomial has them: shuffling would always give the same.
    variance = rate * (1 - rate)
    assert plausible(float(((included.sum(axis=0) - steps * rate) ** 2).sum() / (steps * variance)), n)
    sizes = np.bincount(included.sum(axis=1), minlength=n + 1)
    assert plausible(*goodness_of_fit(sizes, binom.pmf(np.arange(n + 1), n, rate) * steps))
    # 2. No two rows of a step, and no two steps of a row, know of each other.
    centred = (included - rate) / math.sqrt(variance)
    if n > 1:
        correlations = (centred.T @ centred)[np.triu_indices(n, 1)] / math.sqrt(steps)
        assert plausible(float((correlations**2).sum()), len(correlations))
    assert plausible(float(((centred[1:] * centred[:-1]).sum(axis=0) ** 2 / (steps - 1)).sum()), n)


def test_both_ways_give_every_set_of_rows_its_probability() -> None:
    """Four rows have sixteen sets; this is the whole distribution, not its moments."""
    rate, steps = 1 / 16, 8000
    for way in ("_by_blocks", "_by_rows"):
        sampler = PoissonSampler(4, rate, KEY)
        batches = [int((1 << getattr(sampler, way)()).sum()) for _ in range(steps)]
        sizes = np.array([mask.bit_count() for mask in range(16)])
        expected = rate**sizes * (1 - rate) ** (4 - sizes) * steps
        assert plausible(*goodness_of_fit(np.bincount(batches, minlength=16), expected))


def test_rows_that_came_up_twice_are_drawn_again_without_favour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of eight rows collide four times out of five. Every set of five must remain equally likely."""
    sampler, steps = PoissonSampler(16, 1 / 16, KEY), 3000
    sampler._shift, sampler._blocks = 3, 2
    monkeypatch.setattr(sampler, "_counts", lambda: np.array([5, 0]))
    batches = [int((1 << sampler.next_batch()).sum()) for _ in range(steps)]
    sets = [mask for mask in range(256) if mask.bit_count() == 5]
    assert set(batches) == set(sets)
    assert plausible(*goodness_of_fit(np.bincount(batches)[sets], np.full(56, steps / 56)))


@pytest.mark.parametrize(("shift", "rate"), [(0, 0.03), (4, 1 / 16), (8, 0.05), (10, 0.0123), (7, 1e-30), (9, 1e-9)])
def test_the_table_of_a_block_is_the_binomial_to_190_bits(shift: int, rate: float) -> None:
    threshold, size = int(rate * 2.0**64), 2**shift
    boundaries = binomial_boundaries(shift, threshold)
    assert len(boundaries) <= size, "a block cannot include more rows than it has"
    denominator = 2 ** (64 * size)
    masses = [math.comb(size, k) * threshold**k * (2**64 - threshold) ** (size - k) for k in range(len(boundaries) + 1)]
    for boundary, exact in zip(boundaries, itertools.accumulate(masses), strict=False):
        assert abs(boundary * denominator - exact * 2**192) <= 4 * denominator
    assert (denominator - sum(masses)) * 2**190 < denominator, "larger numbers than the table has"
    probabilities = np.diff([0, *boundaries, 2**192])
    assert sum(probabilities.tolist()) == 2**192
    assert min(probabilities.tolist()) >= 0


@pytest.mark.parametrize("k", [0, 9, 60, 90])
def test_a_word_that_does_not_decide_takes_another(k: int) -> None:
    """The first word equals a boundary's first 64 bits: the next 128 bits say on which side of it the number lies."""
    sampler = PoissonSampler(10**6, 0.01, KEY)
    boundary = sampler._boundaries[k]
    middle = 2**62  # nowhere near a boundary
    expected = [int(binom.ppf(0.25, 2**sampler._shift, 0.01))] * (sampler._blocks - 1)
    for number, count in ((boundary - 1, k), (boundary, k + 1)):
        first, *rest = (number >> 128, (number >> 64) % 2**64, number % 2**64)
        sampler._stream = Scripted([middle] * (sampler._blocks - 1) + [first, *rest])
        assert sampler._counts().tolist() == [*expected, count]


def test_a_step_costs_what_it_draws_not_what_there_is() -> None:
    """10⁸ rows and 10³ of them a step: the words that are drawn, which do not depend on the machine."""
    sampler = PoissonSampler(10**8, 1e-5, KEY)
    sampler._stream = stream = Counting(KEY)
    rows = np.concatenate([sampler.next_batch() for _ in range(50)])
    assert stream.drawn < 1.2 * len(rows) + 50 * 100
    assert abs(len(rows) - 50_000) < 4 * math.sqrt(50_000)
    tenths = np.bincount(rows // 10**7, minlength=10)
    assert plausible(*goodness_of_fit(tenths, np.full(10, len(rows) / 10)))


def test_rows_beyond_32_bits_are_reached() -> None:
    sampler = PoissonSampler(10**12, 1e-11, KEY)
    rows = np.concatenate([sampler.next_batch() for _ in range(500)])
    assert abs(len(rows) - 5000) < 4 * math.sqrt(5000)
    tenths = np.bincount(rows // 10**11, minlength=10)
    assert plausible(*goodness_of_fit(tenths, np.full(10, len(rows) / 10)))


def test_empty_batches_are_steps_and_are_not_dropped() -> None:
    sampler = PoissonSampler(10, 0.02, KEY)
    sizes = [len(sampler.next_batch()) for _ in range(2000)]
    expected = 0.98**10
    assert abs(sizes.count(0) / 2000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 2000)
    for n, rate in ((0, 0.5), (0, 0.01), (1000, 2.0**-70)):
        empty = PoissonSampler(n, rate, KEY).next_batch()
        assert empty.dtype == np.int64
        assert empty.tolist() == []


def test_the_sample_rate_is_never_exceeded() -> None:
    assert PoissonSampler(5, 1.0, KEY).next_batch().tolist() == [0, 1, 2, 3, 4]
    for rate in (0.1, 1 / 3, 1e-9, math.nextafter(1.0, 0.0)):
        threshold = PoissonSampler(1, rate, KEY)._threshold
        numerator, denominator = rate.as_integer_ratio()
        assert threshold * denominator <= numerator * 2**64 < (threshold + 1) * denominator
    for rate in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="sample rate"):
            PoissonSampler(5, rate, KEY)


def noise_of(secret: bytes = KEY, *, run: str = "r", attempt: int = 1, rank: int = 0) -> GaussianNoise:
    return GaussianNoise(secret, run=run, attempt=attempt, rank=rank)


def sample(noise: GaussianNoise, step: int, count: int, std: float) -> torch.Tensor:
    """The step's values by themselves."""
    values = torch.zeros(count, dtype=torch.float64)
    noise.add_to(step, values, std, UNIT)
    return values


def test_noise_has_the_moments_and_tails_of_a_gaussian() -> None:
    std, count = 3.0, 400_000
    z = sample(noise_of(), 0, count, std).numpy() / std
    assert abs(z.mean()) < 4 / math.sqrt(count)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / count)
    grid = np.linspace(-3.5, 3.5, 50)
    exact = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in grid])
    empirical = np.searchsorted(np.sort(z), grid) / count
    assert np.abs(empirical - exact).max() < 2.0 / math.sqrt(count)  # Kolmogorov-Smirnov, far tail


@pytest.mark.parametrize("count", [1, 8, 17, CHUNK_VALUES + 1])
def test_noise_is_box_muller_values_of_the_chacha20_keystream(count: int) -> None:
    """The last chunk of a step, value by value, from the description at the top of the module and `math` alone."""
    sampled = sample(noise_of(), 7, count, 2.5)
    key = derive_key(KEY, purpose="noise", run="r", attempt=1, rank=0, step=7)
    chunk = (count - 1) // CHUNK_VALUES
    values = count - chunk * CHUNK_VALUES
    columns = 8 * -(-values // 16)
    nonce = bytes(4) + chunk.to_bytes(12, "little")
    stream = Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(24 * columns))
    words = [int.from_bytes(stream[i : i + 8], "little") for i in range(0, len(stream), 8)]
    expected = []
    for value in range(values):
        part, column = (math.cos, value) if value < columns else (math.sin, value - columns)
        r, a, both = words[column] >> 1, words[columns + column] >> 11, words[2 * columns + column]
        exact = 2.5 * math.sqrt(-2 * math.log((r + 1) / 2**63)) * part(2 * math.pi * a / 2**53)
        dither = (both & 2**32 - 1 if value < columns else both >> 32) >> 32 - 24
        expected.append((round(exact / UNIT) + dither - 2**23) * UNIT)
    assert sampled[chunk * CHUNK_VALUES :].tolist() == pytest.approx(expected, rel=1e-12, abs=UNIT)


def test_the_smallest_radii_are_63_bits_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        def update_into(self, _zeros: bytes, room: memoryview) -> None:
            room[:] = b"".join(word.to_bytes(8, "little") * 8 for word in (5 << 1, 0, 0))

    monkeypatch.setattr(noise_module, "chacha20", lambda _key, _chunk: Words())
    value = float(sample(noise_of(), 0, 1, 1.0)[0])
    assert value == pytest.approx(math.sqrt(-2 * math.log(6 / 2**63)) - 2.0**23 * UNIT, abs=UNIT)


def test_a_noisy_sum_is_as_many_whole_units_from_the_sum_whatever_that_is() -> None:
    """Or the lowest bits would tell which of the noise's finitely many values was added, and so the sum."""
    for std, unit in ((2.5, 2.0**-32), (1e-3, 2.0**-40), (40.0, 2.0**-20)):
        added = []
        for whole in (0, 1, -3, 12345678901):
            sum_p = torch.full((1000,), whole * unit, dtype=torch.float64)
            noise_of().add_to(0, sum_p, std, unit)
            steps = sum_p.numpy() / unit
            assert np.array_equal(steps, np.round(steps))
            added.append(steps - whole)
        assert all(np.array_equal(each, added[0]) for each in added)
        assert len(set((added[0] % 2).tolist())) == 2, "and not on a coarser grid"


def test_radii_that_uniforms_of_53_bits_leave_apart_are_blurred() -> None:
    """With two in fourteen million pairs, radii of 53 bits would tell a true sum from a wrong one."""
    bits = dither_bits(1.0, UNIT)
    assert bits == 24
    units = sample(noise_of(), 0, 2 * CHUNK_VALUES, 1.0).numpy() / UNIT
    keyed = derive_key(KEY, purpose="noise", run="r", attempt=1, rank=0, step=0)
    without = torch.zeros(2 * CHUNK_VALUES, dtype=torch.float64)
    noise_module.add_gaussians(without, keyed, 1.0, 1.0 / 2**8)  # a grid so coarse that nothing is blurred
    assert dither_bits(1.0, 1.0 / 2**8) == 0
    blur = units - without.numpy() / UNIT
    assert 0.28 < blur.std() / 2**24 / math.sqrt(2) < 0.30, "of the dither, and of the rounding, one unit of 2⁻⁸ each"
    assert dither_bits(0.01, UNIT) == 17
    assert dither_bits(1.0, 1.0) == 0


def test_values_of_one_step_and_of_two_steps_are_uncorrelated() -> None:
    noise, count = noise_of(), 2 * CHUNK_VALUES
    first, second = sample(noise, 0, count, 1.0).numpy(), sample(noise, 1, count, 1.0).numpy()
    quarters = np.split(first, 4)  # cosines and sines of two chunks
    pairs = [(first, second), *itertools.combinations(quarters, 2)]
    for a, b in [*pairs, *((a**2 - 1, b**2 - 1) for a, b in pairs)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))
    # On a grid of 2⁻³² some values meet by chance: about four pairs of 2¹⁶, never many.
    assert len(np.unique(np.concatenate([first, second]))) > 2 * count - 30


def test_noise_differs_between_secrets_runs_attempts_ranks_and_steps() -> None:
    named = [
        noise_of(), noise_of(fresh_secret()), noise_of(run="s"), noise_of(attempt=2), noise_of(rank=1),
    ]  # fmt: skip
    values = [sample(noise, step, 8, 1.0) for noise in named for step in (0, 1)]
    assert len(torch.cat(values).unique()) == 80
    assert torch.equal(sample(noise_of(), 1, 8, 1.0), values[1]), "the test itself: one name, one stream"


def test_a_step_that_is_repeated_or_gone_back_to_draws_nothing() -> None:
    noise = noise_of()
    sample(noise, 3, 4, 1.0)
    for step in (3, 2, 0, -1):
        sum_p = torch.ones(4, dtype=torch.float64)
        with pytest.raises(IntegrityError, match="again"):
            noise.add_to(step, sum_p, 1.0, UNIT)
        assert sum_p.tolist() == [1.0] * 4
    sample(noise, 9, 4, 1.0)
    with pytest.raises(IntegrityError, match="again"):
        sample(noise, 4, 4, 1.0)


def test_a_step_that_failed_halfway_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = noise_of()
    with monkeypatch.context() as patched:
        patched.setattr(noise_module, "_gaussians", lambda *_: (_ for _ in ()).throw(OSError("memory is full")))
        with pytest.raises(OSError, match="full"):
            noise.add_to(0, torch.zeros(4, dtype=torch.float64), 1.0, UNIT)
    with pytest.raises(IntegrityError, match="again"):
        noise.add_to(0, torch.zeros(4, dtype=torch.float64), 1.0, UNIT)


def test_noise_can_be_neither_copied_nor_pickled_nor_printed() -> None:
    noise = noise_of()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="never"):
            attempt(noise)
    assert KEY.hex() not in repr(noise)
    assert repr(KEY) not in repr(noise)


def test_noise_refuses_a_bad_deviation_and_a_vector_that_would_lose_it() -> None:
    noise = noise_of()
    assert sample(noise, 0, 0, 1.0).shape == (0,)
    assert sample(noise, 1, 7, 0.0).abs().max() == 0.0
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="standard deviation"):
            sample(noise, 2, 1, std)
    for wrong in (torch.zeros(8), torch.zeros(8, dtype=torch.int64), torch.zeros((2, 4), dtype=torch.float64),
                  torch.zeros(16, dtype=torch.float64)[::2]):  # fmt: skip
        with pytest.raises(ValueError, match="contiguous vector"):
            noise.add_to(2, wrong, 1.0, UNIT)
    assert sample(noise, 2, 1, 1.0).abs().max() > 0.0, "what was refused has drawn nothing"


def test_a_device_without_secure_noise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = noise_of()
    with pytest.raises(UnavailableError, match="meta"):
        noise.add_to(0, torch.zeros(8, dtype=torch.float64, device="meta"), 1.0, UNIT)
    monkeypatch.setitem(sys.modules, "triton", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "cloister.privacy.noise_cuda", raising=False)
    monkeypatch.delattr("cloister.privacy.noise_cuda", raising=False)
    with pytest.raises(UnavailableError, match="Triton"):
        noise_module._implementation("cuda")


# Names by which PyTorch, NumPy and Python hand out randomness that somebody else could repeat.
PREDICTABLE = re.compile(
    r"(rand(n|int|perm)?(_like)?|normal_?|uniform_?|bernoulli_?|exponential_?|multinomial|default_rng|dropout"
    r"|standard_normal|RandomState|manual_seed|seed|fork_rng|Generator)"
)
# Public weights to start from, made-up rows and copies to probe an export, a device and a model with, dropout under
# the attempt's secret, and the baseline without privacy.
NOT_NOISE = {
    "training/architectures.py": {"manual_seed", "fork_rng"},
    "training/export.py": {"rand", "manual_seed", "Generator"},
    "training/rehearsal.py": {"randint", "manual_seed", "Generator"},
    "training/trial.py": {"default_rng", "Generator"},
    "privacy/broadcast.py": {"randn", "manual_seed", "Generator"},
    "privacy/microbatch.py": {"rand", "randn", "randint", "randperm", "manual_seed", "Generator", "dropout"},
    "privacy/mechanism.py": {"manual_seed", "fork_rng"},
    "training/baseline.py": {"randperm", "manual_seed", "default_rng", "Generator"},
}


def test_no_predictable_generator_is_anywhere_near_the_noise() -> None:
    found: dict[str, set[str]] = {}
    for path in sorted(p for folder in ("privacy", "training") for p in (SOURCE / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and PREDICTABLE.fullmatch(node.attr):
                found.setdefault(path.relative_to(SOURCE).as_posix(), set()).add(node.attr)
    assert found.keys() >= NOT_NOISE.keys(), "the search works"
    assert {path: names - NOT_NOISE.get(path, set()) for path, names in found.items()} == {
        path: set() for path in found
    }
