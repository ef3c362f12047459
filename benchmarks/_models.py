"""The models that the engine is measured on, and public rows for them. Needs torch only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, positions, width = x.shape
        q, k, v = self.qkv(x).view(rows, positions, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(rows, positions, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal=causal)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Tokens in, logits of the row's class, or of each next token, out."""

    def __init__(self, words: int, positions: int, width: int, heads: int, layers: int, classes: int | None) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=classes is None) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes or words, bias=classes is not None)
        self.generates = classes is None
        if self.generates:
            self.head.weight = self.words.weight  # tied, as in GPT-2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
        hidden = self.words(x) + self.places(places)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden)
        return self.head(hidden if self.generates else hidden.mean(1))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """ViT-B/16 (Dosovitskiy et al., arXiv 2010.11929) at 224 pixels, with mean pooling in place of a class token."""

    def __init__(self, side: int = 224, patch: int = 16, width: int = 768, heads: int = 12, layers: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.places = nn.Embedding((side // patch) ** 2, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.patches(x).flatten(2).transpose(1, 2)
        places = torch.arange(hidden.shape[1], device=x.device).repeat(len(x), 1)
        hidden = hidden + self.places(places)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden).mean(1))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model, rows for it, how many a step has, and how many at once (on a CPU, our own side chooses by itself)."""

    name: str
    build: Callable[[], nn.Module]
    rows: int
    microbatch: int
    draw: Callable[[int], tuple[torch.Tensor, torch.Tensor]]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def _pictures(*shape: int) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    return lambda rows: (torch.rand((rows, *shape)), torch.randint(0, 10, (rows,)))


def _text(words: int, positions: int, classes: int | None) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    def draw(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randint(0, words, (rows, positions + 1))
        return x[:, :-1].contiguous(), x[:, 1:].contiguous() if classes is None else x[:, 0] % classes

    return draw


CPU: tuple[Workload, ...] = (
    Workload(name="MLP 512-512", build=mlp, rows=2048, microbatch=2048, draw=_pictures(784)),
    Workload(name="three-layer CNN", build=cnn, rows=256, microbatch=256, draw=_pictures(3, 32, 32)),
    Workload(
        name="transformer d 256, T 64", rows=128, microbatch=128, draw=_text(1024, 64, 10),
        build=lambda: Transformer(1024, 64, 256, 4, 4, 10),
    ),
)  # fmt: skip
CUDA: tuple[Workload, ...] = (
    Workload(name="ViT-B/16 at 224", build=VisionTransformer, rows=512, microbatch=128, draw=_pictures(3, 224, 224)),
    Workload(
        name="decoder of 124M, T 1024", rows=64, microbatch=16, draw=_text(50257, 1024, None),
        build=lambda: Transformer(50257, 1024, 768, 12, 12, None),
    ),
)  # fmt: skip
