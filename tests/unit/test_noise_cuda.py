"""The kernel for GPUs draws what the CPU draws: in Triton's interpreter where Triton is, and on a GPU where one is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from cloister.privacy import noise
from cloister.privacy.noise import CHUNK_VALUES, GaussianNoise

triton = pytest.importorskip("triton", reason="no Triton here: PyTorch for CPUs comes without; pip install triton")
tl = triton.language

from cloister.privacy import noise_cuda  # noqa: E402 - needs Triton

ROOT = Path(__file__).resolve().parents[2]
# Its words have their highest bits set: as signed numbers they are negative, and sums wrap around.
KEY = bytes(255 - i for i in range(32))


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def words_of_blocks(
    out,
    first,
    nonce,
    k0,
    k1,
    k2,
    k3,
    k4,
    k5,
    k6,
    k7,
    K: tl.constexpr,  # noqa: N803 - as Triton writes constants
) -> None:  # type: ignore[no-untyped-def]  # what a kernel takes is not of Python
    block = tl.arange(0, K)
    words = noise_cuda._block(
        (first + block).to(tl.uint32), nonce.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32), k2.to(tl.uint32),
        k3.to(tl.uint32), k4.to(tl.uint32), k5.to(tl.uint32), k6.to(tl.uint32), k7.to(tl.uint32),
    )  # fmt: skip
    tl.store(out + block[:, None] * 8 + tl.arange(0, 8)[None, :], words.to(tl.int64))


def check_words() -> None:
    for first, nonce in ((0, 0), (2**31 - 8, 3), (2**32 - 16, 2**31 + 1)):
        out = torch.zeros(16 * 8, dtype=torch.int64)
        words_of_blocks[(1,)](out, first, nonce, *np.frombuffer(KEY, "<i4").tolist(), K=16)
        full_nonce = first.to_bytes(4, "little") + nonce.to_bytes(12, "little")
        expected = Cipher(ChaCha20(KEY, full_nonce), mode=None).encryptor().update(bytes(16 * 64))
        assert out.numpy().tobytes() == expected, (first, nonce)


def check_values() -> None:
    """Small chunks: a whole one of two programs, and one that ends within the second program."""
    noise.CHUNK_VALUES = noise_cuda.CHUNK_VALUES = chunk = 32 * noise_cuda._COLUMNS_PER_PROGRAM
    for unit, count in ((2.0**-32, 2 * chunk - 1500), (2.0**-5, 5)):
        start = torch.arange(count + 1, dtype=torch.float64) * unit
        mine, theirs = start.clone(), start.clone()
        noise_cuda.add_gaussians(mine[:count], KEY, 1.0 / 3, unit)
        noise.add_gaussians(theirs[:count], KEY, 1.0 / 3, unit)
        assert float((mine - theirs).abs().max()) <= unit, "but for how logarithm, sine and cosine are rounded"
        assert float((mine != theirs).double().mean()) < 0.01
        assert torch.equal(mine / unit, (mine / unit).round())
        assert not torch.allclose(mine[:count], start[:count], atol=0.01)
        assert mine[count] == start[count], "nothing is added beyond the end"
    noise_cuda.add_gaussians(torch.zeros(0, dtype=torch.float64), KEY, 1.0, unit)


@pytest.mark.parametrize("check", ["check_words", "check_values"])
def test_the_kernel_draws_what_the_cpu_draws(check: str) -> None:
    """In a process of its own: Triton reads whether to interpret when a kernel is defined."""
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT / "tests" / "unit"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", f"import test_noise_cuda; test_noise_cuda.{check}()"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_compiles_for_gpus_that_are_not_here(capability: int) -> None:
    """To machine code of Ampere, Hopper and Blackwell, by the assembler that Triton brings along."""
    types = {
        "sum_ptr": "*fp64", "count": "i64", **dict.fromkeys(noise_cuda._KEY_WORDS, "i32"),
        "units_bits": "i64", "unit_bits": "i64", "bits": "i32",
    }  # fmt: skip
    sizes = {"CHUNK": CHUNK_VALUES, "K": noise_cuda._COLUMNS_PER_PROGRAM}
    source = triton.compiler.ASTSource(noise_cuda._add_gaussians, types | dict.fromkeys(sizes, "constexpr"), sizes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    assert triton.compile(source, target=target, options={"num_warps": 4}).asm["cubin"].startswith(b"\x7fELF")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_adds_what_the_cpu_adds() -> None:
    for step, count in enumerate((1, 1000, CHUNK_VALUES, 40 * CHUNK_VALUES + 77)):
        start = torch.arange(count, dtype=torch.float64) * 2.0**-32
        sums = []
        for device in ("cpu", "cuda"):
            sums.append(start.to(device, copy=True))
            GaussianNoise(KEY, run="r", attempt=1, rank=0).add_to(step, sums[-1], 0.7, 2.0**-32)
        assert float((sums[0] - sums[1].cpu()).abs().max()) <= 2.0**-32
    assert len(noise_cuda._add_gaussians.device_caches[torch.cuda.current_device()][0]) <= 4, (
        "one a type, not one a key"
    )
