"""Privacy: DP-SGD in parts that do not know each other. `plan` alone couples them.

keystream    the random bytes: ChaCha20 streams under keys that exist once
sampling     Poisson sampling of rows
clipping     per-row clipped gradients
noise        Gaussian noise
accounting   what it costs, by two accountants
plan         the privacy of one run, decided before it touches data
spec         what an engineer asks for
"""
