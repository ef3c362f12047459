"""Privacy: DP-SGD in parts that do not know each other. `plan` couples what is decided, `mechanism` what is done.

spec         what an engineer asks for
plan         the privacy of one run, decided before it touches data
accounting   what it costs, by two accountants and a bound; of several rows of a person too (`units`);
             `accountant_process` does it beside an authority
mechanism    sampler, clipping and noise of a plan, on one rank
keystream    the random bytes: ChaCha20 streams under keys that exist once
sampling     Poisson sampling of rows
clipping     per-row clipped gradients, and `opacus_engine`, the second engine
microbatch   rows that do not depend on each other, tried on the device
grid         sums and noise in whole units; `blocks` of rows
noise        Gaussian noise
evaluation   the noisy histogram of a model's evaluation, and what follows from it; `geometric` noise
rowwise      what a model gives of each row, whatever is beside it
auditing     what attacks on a run tell of its epsilon
"""
