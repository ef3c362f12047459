"""Models and batches for what must hold whatever the architecture, and autograd in float64 as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from cloister.privacy.clipping import row_losses


@dataclass(frozen=True, slots=True)
class Case:
    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor


def oracle(case: Case, bound: float, precision: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain autograd, one row at a time: the clipped sum, and the norms before clipping, in float64."""
    model = case.model.to(precision)
    x = case.x.to(precision) if case.x.is_floating_point() else case.x
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, norms = torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64), []
    for i in range(len(x)):
        loss = row_losses(model(x[i : i + 1]), case.y[i : i + 1]).sum()
        flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trained)]).double()
        norms.append(flat.norm())
        total += flat * min(1.0, bound / float(flat.norm()))
    model.float()
    return total, torch.stack(norms)


class Attention(nn.Module):
    """Self-attention out of linear layers."""

    def __init__(self, width: int, heads: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.heads = norm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, positions, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(rows, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, positions, width)
        return x + self.out(mixed)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Tokens in; a class for each row out, or, as a language model, a token for each position."""

    def __init__(self, words: int, positions: int, width: int, heads: int, outputs: int, *, tied: bool, norm: type[nn.Module]) -> None:  # noqa: E501  # fmt: skip
        super().__init__()
        padding = 0 if tied else None  # Opacus counts the gradient of the padding too, which there is none of
        self.words = nn.Embedding(words, width, padding_idx=padding)
        self.places = nn.Embedding(positions, width)
        self.attention = Attention(width, heads, norm)
        self.feed = nn.Sequential(norm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, words if tied else outputs, bias=not tied)
        if tied:
            self.head.weight = self.words.weight
        self.tied = tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.words(x) + self.places(torch.arange(x.shape[1]).repeat(len(x), 1))
        hidden = self.attention(hidden)
        hidden = hidden + self.feed(hidden)
        return self.head(hidden) if self.tied else self.head(hidden.mean(1))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """A small vision transformer's way with parameters that belong to no layer: a class token, positions and scales."""

    def __init__(self, inputs: int, patches: int, width: int, classes: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(patches + 1, width))
        self.scale, self.warmth = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.tensor(0.7))
        self.embed, self.head = nn.Linear(inputs, width), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.places
        hidden = torch.tanh(hidden) * self.scale
        return self.head(hidden[:, 0] + hidden.mean(1)) * self.warmth  # type: ignore[no-any-return]


def _labels(generator: torch.Generator, rows: int, classes: int = 3) -> torch.Tensor:
    return torch.randint(0, classes, (rows,), generator=generator)


def _mlp(generator: torch.Generator, rows: int) -> Case:
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 3))
    return Case(model, torch.randn((rows, 12), generator=generator) * 3, _labels(generator, rows))


def _convolutional(generator: torch.Generator, rows: int) -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, 3),
    )  # fmt: skip
    return Case(model, torch.randn((rows, 1, 3, 4), generator=generator) * 3, _labels(generator, rows))


def _strided(generator: torch.Generator, rows: int) -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), nn.GELU(),
        nn.Conv2d(6, 8, (3, 2), padding="same", dilation=2),
        nn.GroupNorm(4, 8), nn.Conv2d(8, 40, 4, bias=False), nn.Flatten(), nn.Linear(40, 3),
    )  # fmt: skip
    return Case(model, torch.randn((rows, 3, 8, 8), generator=generator), _labels(generator, rows))


def _signal(generator: torch.Generator, rows: int) -> Case:
    model = nn.Sequential(
        nn.Conv1d(2, 6, 3, stride=2, padding=1), nn.SiLU(), nn.Conv1d(6, 4, 3, groups=2, dilation=2), nn.Flatten(),
        nn.RMSNorm(16), nn.Linear(16, 3),
    )  # fmt: skip
    return Case(model, torch.randn((rows, 2, 16), generator=generator), _labels(generator, rows))


def _tokens(generator: torch.Generator, rows: int) -> Case:
    model = Transformer(7, 5, 8, 2, 3, tied=False, norm=nn.LayerNorm)
    return Case(model, torch.randint(0, 7, (rows, 5), generator=generator), _labels(generator, rows))


def _tied(generator: torch.Generator, rows: int) -> Case:
    model = Transformer(9, 6, 8, 2, 3, tied=True, norm=nn.RMSNorm)
    words = torch.randint(0, 9, (rows, 7), generator=generator)
    return Case(model, words[:, :-1], words[:, 1:])


def _own(generator: torch.Generator, rows: int) -> Case:
    return Case(Patches(4, 5, 8, 3), torch.randn((rows, 5, 4), generator=generator), _labels(generator, rows))


def _twice(generator: torch.Generator, rows: int) -> Case:
    return Case(Twice(6), torch.randn((rows, 6), generator=generator), _labels(generator, rows))


FAMILIES: dict[str, Callable[[torch.Generator, int], Case]] = {
    "mlp": _mlp,
    "convolutional": _convolutional,
    "strided": _strided,
    "signal": _signal,
    "tokens": _tokens,
    "tied": _tied,
    "twice": _twice,
    "own": _own,
}


def random_case(seed: int) -> Case:
    """An architecture, its weights and a batch of rows, all drawn from `seed`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(0, len(choices), (1,), generator=generator))]

    kind, rows, classes = pick(0, 1, 2, 3), pick(4, 7), pick(2, 5, 11)
    labels = _labels(generator, rows, classes)
    activation = (nn.Tanh, nn.SiLU, nn.GELU, nn.ReLU)[pick(0, 1, 2, 3)]
    if kind == 0:
        sizes = [pick(3, 17, 40), *(pick(4, 16, 33) for _ in range(pick(1, 2, 3)))]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs, bias=bool(pick(0, 1))), activation()]
            layers += [nn.LayerNorm(outputs), nn.RMSNorm(outputs), nn.Identity()][pick(0, 1, 2) :][:1]
        model = nn.Sequential(*layers, nn.Linear(sizes[-1], classes))
        return Case(model, torch.randn((rows, sizes[0]), generator=generator), labels)
    if kind in (1, 2):  # signals and pictures
        side, channels = pick(7, 8, 12), pick(1, 2, 4)
        convolution: type[nn.Conv1d | nn.Conv2d] = nn.Conv1d if kind == 1 else nn.Conv2d
        layers = []
        for _ in range(pick(1, 2)):
            groups = pick(1, 2) if channels % 2 == 0 else 1
            width = 4 * pick(1, 2, 3)
            layers += [
                convolution(channels, width, pick(2, 3), stride=pick(1, 2), padding=pick(0, 1), groups=groups,
                            bias=bool(pick(0, 1))),
                nn.GroupNorm(pick(1, 2), width) if pick(0, 1) else nn.Identity(), activation(),
            ]  # fmt: skip
            channels = width
        first = layers[0]
        assert isinstance(first, nn.Conv1d | nn.Conv2d)
        x = torch.randn((rows, first.in_channels, *[side] * kind), generator=generator)
        with torch.no_grad():
            flat = nn.Sequential(*layers, nn.Flatten())(x[:1]).shape[1]
        return Case(nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, classes)), x, labels)
    words, positions, tied = pick(5, 23), pick(3, 6, 12), bool(pick(0, 1))
    norm = (nn.LayerNorm, nn.RMSNorm)[pick(0, 1)]
    model_ = Transformer(words, positions, 4 * pick(1, 2, 4), pick(1, 2), classes, tied=tied, norm=norm)
    text = torch.randint(0, words, (rows, positions + 1), generator=generator)
    return Case(model_, text[:, :-1], text[:, 1:] if tied else labels)
