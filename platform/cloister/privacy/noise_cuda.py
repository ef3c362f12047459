# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Triton compiles the source of the kernels below: their parameters are tensors of a program, not values of Python.
"""The noise of `noise`, made on the GPU by one kernel, so that nothing but the key crosses from the host.

Guarantees: the same values as `noise.add_gaussians` for the same key, up to the rounding of logarithm, sine and cosine:
the same ChaCha20 blocks (RFC 8439 section 2.3), the same uniforms and the same dither, float64 throughout, whole
numbers of units. Every kernel call reads and writes the tensor once; words and Gaussians stay in registers. A key never
selects code: the kernel is compiled once, whatever its key words are.

Not promised: secrecy of the key or of draws against other code that runs on the same GPU in this process.

Imported only where the tensor is on a CUDA device. `TRITON_INTERPRET=1` runs the kernel without one.

Shapes: K columns of a program, each one block of radii, one of angles and one of dither, so eight pairs of values.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from cloister.privacy.noise import CHUNK_VALUES, dither_bits

_COLUMNS_PER_PROGRAM = 128  # one a thread, in four warps
_VALUES_PER_COLUMN = 16
_PROGRAM_LIMIT = 2**31 - 1  # CUDA's, for one dimension of a grid
_KEY_WORDS = [f"key_{i}" for i in range(8)]


@triton.jit
def _sum(x, y):
    """Modulo 2³², and meant so: Triton's debug mode must not take it for an overflow."""
    return tl.add(x, y, sanitize_overflow=False)


@triton.jit
def _quarter_round(a, b, c, d):
    """RFC 8439 section 2.1."""
    a = _sum(a, b)
    d ^= a
    d = (d << 16) | (d >> 16)
    c = _sum(c, d)
    b ^= c
    b = (b << 12) | (b >> 20)
    a = _sum(a, b)
    d ^= a
    d = (d << 8) | (d >> 24)
    c = _sum(c, d)
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def _word(low, high):
    """Two little-endian halves as one 64-bit word."""
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def _block(counter, nonce, k0, k1, k2, k3, k4, k5, k6, k7):
    """The eight 64-bit words [K, 8] of blocks `counter` [K]: RFC 8439 section 2.3.1, with nonce (`nonce`, 0, 0)."""
    none = tl.zeros_like(counter)
    i0, i1, i2, i3 = none + 0x61707865, none + 0x3320646E, none + 0x79622D32, none + 0x6B206574
    i4, i5, i6, i7, i8, i9, i10, i11 = (
        none + k0, none + k1, none + k2, none + k3, none + k4, none + k5, none + k6, none + k7
    )  # fmt: skip
    i13 = none + nonce
    x0, x1, x2, x3, x4, x5, x6, x7 = i0, i1, i2, i3, i4, i5, i6, i7
    x8, x9, x10, x11, x12, x13, x14, x15 = i8, i9, i10, i11, counter, i13, none, none
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    w0, w1, w2, w3 = _word(x0 + i0, x1 + i1), _word(x2 + i2, x3 + i3), _word(x4 + i4, x5 + i5), _word(x6 + i6, x7 + i7)
    w4, w5 = _word(x8 + i8, x9 + i9), _word(x10 + i10, x11 + i11)
    w6, w7 = _word(x12 + counter, x13 + i13), _word(x14, x15)
    # The last index changes fastest: word 4a + 2b + c is at [a, b, c].
    even, odd = tl.join(tl.join(w0, w4), tl.join(w2, w6)), tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), (counter.shape[0], 8))


@triton.jit
def _whole(x):
    """The nearest whole number, of two equally near the even one: beyond 2⁵² a float64 has no other."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _dither(half, bits):
    """The upper `bits` of 32, around 0."""
    upper = (half >> (32 - bits).to(tl.uint64)).to(tl.int64) - (1 << bits.to(tl.int64)) // 2
    return tl.where(bits > 0, upper, 0).to(tl.float64)


@triton.jit(do_not_specialize=["count", *_KEY_WORDS, "units_bits", "unit_bits", "bits"])
def _add_gaussians(
    sum_ptr, count, key_0, key_1, key_2, key_3, key_4, key_5, key_6, key_7, units_bits, unit_bits, bits,
    CHUNK: tl.constexpr, K: tl.constexpr,  # noqa: N803 - as Triton writes constants
):  # fmt: skip
    k0, k1, k2, k3 = key_0.to(tl.uint32), key_1.to(tl.uint32), key_2.to(tl.uint32), key_3.to(tl.uint32)
    k4, k5, k6, k7 = key_4.to(tl.uint32), key_5.to(tl.uint32), key_6.to(tl.uint32), key_7.to(tl.uint32)
    units = units_bits.to(tl.int64).to(tl.float64, bitcast=True)
    unit = unit_bits.to(tl.int64).to(tl.float64, bitcast=True)
    programs: tl.constexpr = CHUNK // (16 * K)
    chunk = tl.program_id(0) // programs
    start = chunk.to(tl.int64) * CHUNK
    values = tl.minimum(count - start, CHUNK).to(tl.int32)
    columns = (values + 15) // 16
    column = (tl.program_id(0) % programs) * K + tl.arange(0, K)
    nonce = chunk.to(tl.uint32)

    words = _block(column.to(tl.uint32), nonce, k0, k1, k2, k3, k4, k5, k6, k7)
    u = ((words >> 1).to(tl.int64).to(tl.float64) + 1.0) * 1.0842021724855044e-19
    words = _block((columns + column).to(tl.uint32), nonce, k0, k1, k2, k3, k4, k5, k6, k7)
    angle = (words >> 11).to(tl.int64).to(tl.float64) * 6.975736996017264e-16
    words = _block((2 * columns + column).to(tl.uint32), nonce, k0, k1, k2, k3, k4, k5, k6, k7)
    radius = tl.sqrt(-2.0 * units * units * tl.log(u))
    cosines = _whole(radius * tl.cos(angle)) + _dither(words & 0xFFFFFFFF, bits)
    sines = _whole(radius * tl.sin(angle)) + _dither(words >> 32, bits)

    place = column[:, None] * 8 + tl.arange(0, 8)[None, :]
    half = columns * 8
    here = (place < half) & (place < values)
    target = sum_ptr + start + place
    tl.store(target, tl.load(target, mask=here) + unit * cosines, mask=here)
    here = place + half < values
    target += half
    tl.store(target, tl.load(target, mask=here) + unit * sines, mask=here)


def add_gaussians(sum_P: torch.Tensor, key: bytes, std: float, unit: float) -> None:  # noqa: N803 - its shape
    """Add the N(0, std²) values of a key to a contiguous vector, in whole units; see `noise.add_gaussians`."""
    programs = -(-len(sum_P) // CHUNK_VALUES) * (CHUNK_VALUES // (_VALUES_PER_COLUMN * _COLUMNS_PER_PROGRAM))
    if programs > _PROGRAM_LIMIT:
        raise ValueError(f"noise is added to at most {_PROGRAM_LIMIT // 8 * CHUNK_VALUES} values at once")
    if programs == 0 or std == 0.0:
        return
    # Signed, and floats' bits: Triton takes a type from a value, and would make a float32 of a float.
    bits_of = struct.unpack("<2q", struct.pack("<2d", std / unit, unit))
    with torch.cuda.device_of(sum_P):
        _add_gaussians[(programs,)](
            sum_P, len(sum_P), *struct.unpack("<8i", key), *bits_of, dither_bits(std, unit),
            CHUNK=CHUNK_VALUES, K=_COLUMNS_PER_PROGRAM, num_warps=4,
        )  # fmt: skip
