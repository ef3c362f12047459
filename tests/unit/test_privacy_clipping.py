"""No row moves the sum by more than C, and the sum is the one that autograd computes row by row."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from architectures import FAMILIES, Case, Patches, oracle, random_case
from cloister.errors import InputError
from cloister.privacy import clipping, products
from cloister.privacy.blocks import Blocks, spread
from cloister.privacy.clipping import BookkeepingGradients, ClippedGradients, ClippingOptions
from cloister.privacy.engines import clipping_engine
from cloister.privacy.grid import SLACK, Block, Grid
from cloister.privacy.layers import RULES

# torch warns that an embedding's input has no gradient, which is so.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
torch.set_num_threads(1)

ENGINES = ("bookkeeping", "opacus")
OPACUS_KNOWS = set(FAMILIES) - {"tied", "own"}  # with a word that is padding, and parameters of no layer
FEW = ClippingOptions(microbatch_rows=4)  # little to try at the start


def fine(bound: float) -> Grid:
    """A grid that is as fine for bounds that clip nothing."""
    return Grid(min(Grid.of(bound, 64).unit, 2.0**-40), bound, 64)


def supported(engine: str) -> list[str]:
    return [name for name in FAMILIES if engine == "bookkeeping" or name in OPACUS_KNOWS]


CASES = [(engine, name) for engine in ENGINES for name in supported(engine)]


def built(name: str, rows: int = 23) -> Case:
    torch.manual_seed(0)
    return FAMILIES[name](torch.Generator().manual_seed(3), rows)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(("engine", "name"), CASES)
@pytest.mark.parametrize("bound", [0.05, 1.0, 1e4])
@pytest.mark.parametrize("microbatch_rows", [5, 1024])
def test_the_sum_is_that_of_autograd_row_by_row(engine: str, name: str, bound: float, microbatch_rows: int) -> None:
    case = built(name)
    expected, _ = oracle(case, bound)
    options = ClippingOptions(microbatch_rows=microbatch_rows)
    got = clipping_engine(engine, case.model, fine(bound), options)(case.x, case.y)
    assert error(got, expected) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_library_for_large_products_gives_the_same_sum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faster, calls = products._ONEDNN, 0
    assert faster is not None, "the locked PyTorch has it"

    def counted(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return faster(*arguments)

    monkeypatch.setattr(products, "_ONEDNN", counted)
    for products_worth, layers_worth in ((0, math.inf), (math.inf, 0)):
        monkeypatch.setattr(products, "_WORTH", products_worth)
        monkeypatch.setattr(products, "_WORTH_A_ROW", layers_worth)
        calls = 0
        case = built(name)
        engine = BookkeepingGradients(case.model, fine(1.0), ClippingOptions(microbatch_rows=5))
        assert error(engine(case.x, case.y), oracle(case, 1.0)[0]) <= 1e-5
        assert calls or name != "mlp"
        engine.close()
        assert not any("forward" in vars(layer) for layer in case.model.modules())


def test_the_oracle_covers_every_supported_layer() -> None:
    tested = {type(layer) for name in FAMILIES for layer in built(name).model.modules()}
    assert tested >= set(RULES)


def test_random_architectures_agree_with_autograd_and_with_opacus_hooks(subtests: pytest.Subtests) -> None:
    shorter = 0
    for seed in range(200):
        with subtests.test(seed):
            shorter += rows_shorter_than_with_autograd(random_case(seed))
    assert shorter <= 8, "of 1,100 rows, those whose positions nearly cancel"


def rows_shorter_than_with_autograd(case: Case) -> int:
    """Asserts that all others are as long, that each has the direction, and that the sum is theirs."""
    # In float32, as the engine: some of these networks blow up rounding in their inputs a hundredfold.
    unclipped, norms = oracle(case, float("inf"), torch.float32)
    bound = float(norms.median())  # about half of the rows are clipped
    expected, _ = oracle(case, bound, torch.float32)
    engine = BookkeepingGradients(case.model, fine(bound), ClippingOptions(microbatch_rows=3))
    rows = torch.stack([engine(case.x[i : i + 1], case.y[i : i + 1]) for i in range(len(case.x))])
    summed = engine(case.x, case.y)
    engine.close()
    assert error(summed, rows.sum(0)) <= 1e-5
    lengths, clipped = rows.norm(dim=1), norms.clamp_max(bound)
    assert float((lengths / clipped).max()) <= 1 + 1e-5
    shorter = int((lengths < clipped * (1 - 1e-5)).sum())
    everything = BookkeepingGradients(case.model, fine(1e6), FEW)
    assert error(everything(case.x, case.y), unclipped) <= 1e-5
    everything.close()
    if not shorter:
        assert error(summed, expected) <= 1e-5
        hooks = _opacus_hooks(case)
        if hooks is not None:
            theirs, hook_norms = hooks(bound)
            assert error(theirs, expected) <= 2e-5, "ours and Opacus's both lie within 1e-5 of autograd"
            assert torch.allclose(lengths, hook_norms.clamp_max(bound), rtol=1e-5)
    return shorter


def _opacus_hooks(case: Case) -> Callable[[float], tuple[torch.Tensor, torch.Tensor]] | None:
    """Opacus's instantiated gradients; None where it does not have the layers."""
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator

    trainable = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    tied = len(trainable) != len(list(case.model.named_parameters(remove_duplicate=False)))
    known = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm}
    own = {type(layer) for layer in case.model.modules() if list(layer.parameters(recurse=False))}
    if tied or not own <= known or not ModuleValidator.is_valid(case.model):
        return None

    def clipped(bound: float) -> tuple[torch.Tensor, torch.Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hooked = GradSampleModule(case.model, loss_reduction="sum")
            clipping.row_losses(hooked(case.x), case.y).sum().backward()
        rows = torch.cat([p.grad_sample.flatten(1) for p in trainable], dim=1).double()  # type: ignore[attr-defined]
        hooked.to_standard_module()
        norms = rows.norm(dim=1)
        return (rows * (bound / norms).clamp_max(1.0)[:, None]).sum(0), norms

    return clipped


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_no_row_contributes_more_than_the_bound(engine: str, name: str) -> None:
    case = built(name, 32)
    for bound in (1e-3, 0.1, 1.0):
        clipped = clipping_engine(engine, case.model, fine(bound))
        for i in range(len(case.x)):
            assert float(clipped(case.x[i : i + 1], case.y[i : i + 1]).norm()) <= bound
        clipped.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_removing_a_row_moves_the_sum_by_at_most_the_bound(engine: str) -> None:
    case = built("mlp", 64)
    clipped = clipping_engine(engine, case.model, fine(0.1))
    whole = clipped(case.x, case.y)
    for i in range(8):
        rest = torch.arange(64) != i
        # Rounding of a float32 sum of 64 rows comes on top.
        assert float((whole - clipped(case.x[rest], case.y[rest])).norm()) <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize("positions", [4, 16, 64])
def test_positions_that_cancel_do_not_hide_a_long_gradient(positions: int) -> None:
    """Norms from Gram matrices lose their digits where a row's positions cancel: they must err upwards then."""
    torch.manual_seed(1)
    half = torch.randn(1, positions // 2, 128) * 1e4
    x = torch.cat([half, -half * (1 + 1e-6)], dim=1)  # what is left of the sum is rounding, and a little more

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(128, 128, bias=False)
            self.head = nn.Linear(128, 3, bias=False).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.linear(x).mean(1))  # type: ignore[no-any-return]

    clipped = BookkeepingGradients(Mean(), fine(1.0))
    for scale in (1e-4, 1.0, 1e4):
        assert float(clipped(x * scale, torch.tensor([1])).norm()) <= 1.0 + SLACK


class Difference(nn.Module):
    """Two positions of a row, through one trained layer, one minus the other."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 2, bias=False).requires_grad_(False)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.zero_()
            self.head.weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return self.head(y[:, 0] - y[:, 1])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("inputs", "outputs"), [(2048, 512), (1024, 1024), (768, 3072)])
def test_a_row_whose_positions_nearly_cancel_keeps_to_the_bound(inputs: int, outputs: int) -> None:
    """Vectors of one number each, whose float32 products all round the same way: twice the bound, unguarded."""
    clipped = BookkeepingGradients(Difference(nn.Linear(inputs, outputs, bias=False), outputs), fine(1e-3))
    for value in (0.123, 0.51, 1.3, 5.61):
        for apart in (1e-2, 3e-3, 1e-3):
            x = torch.full((1, 2, inputs), value)
            x[:, 1] *= 1 - apart
            norm = 1e3 * float(clipped(x, torch.zeros(1, dtype=torch.long)).norm())
            left = apart / (2 - apart)  # of what its positions come to by themselves
            assert 0.95 * min(1.0, left / Block.of(2).floor) <= norm <= 1.0 + 1e-4


def test_a_word_whose_gradients_nearly_cancel_keeps_to_the_bound() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(3, 4096), nn.Linear(4096, 2, bias=False).requires_grad_(False)
            with torch.no_grad():
                self.head.weight.copy_(torch.tensor([[-1.3], [1.3]]).expand(2, 4096))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            words = self.words(x)
            return self.head(words[:, 0] - 0.997 * words[:, 1])  # type: ignore[no-any-return]

    clipped = BookkeepingGradients(Weighted(), fine(1e-3))
    x = torch.ones((1, 2), dtype=torch.long)
    assert 0.9 <= 1e3 * float(clipped(x, torch.zeros(1, dtype=torch.long)).norm()) <= 1.0 + SLACK


@pytest.mark.parametrize(("scale", "left"), [(1e4, 0.01), (1e6, 0.01), (1e6, 1.0), (1e8, 1.0)])
def test_a_word_whose_huge_gradients_cancel_does_not_hide_among_others(scale: float, left: float) -> None:
    """What they leave behind in a float32 sum of other rows would be longer than the bound."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(3, 4096), nn.Linear(4096, 2, bias=False).requires_grad_(False)
            self.register_buffer("times", torch.tensor([0.7 * scale, 0.3 * scale + left, -scale])[:, None])
            with torch.no_grad():
                self.words.weight.zero_()
                direction = torch.randn(4096)
                self.head.weight.copy_(torch.stack([direction, -direction]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.words(x) * self.times).sum(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    clipped = BookkeepingGradients(Weighted(), fine(1.0))
    others, row = torch.tensor([[1, 1, 0]]).repeat(50, 1), torch.zeros((1, 3), dtype=torch.long)
    y = torch.zeros(51, dtype=torch.long)
    moved = clipped(torch.cat([others, row]), y) - clipped(others, y[:50])
    assert float(moved.norm()) <= 1.0 + SLACK


@pytest.mark.parametrize(("positions", "width"), [(64, 1024), (256, 1024), (512, 768)])
@pytest.mark.parametrize("equal", [True, False])
def test_many_positions_that_cancel_by_halves_keep_to_the_bound(positions: int, width: int, equal: bool) -> None:
    """The rounding of a Gram matrix grows with all of its elements, and not with those on its diagonal."""

    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width, bias=False)
            self.head = nn.Linear(width, 2, bias=False).requires_grad_(False)
            self.register_buffer("sign", torch.tensor([1.0, -1.0]).repeat(positions // 2)[:, None])
            with torch.no_grad():
                self.layer.weight.zero_()
                direction = torch.full((width,), 0.37) if equal else torch.randn(width)
                self.head.weight.copy_(torch.stack([-direction, direction]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.layer(x) * self.sign).sum(1))  # type: ignore[no-any-return]

    # What is left is less than a norm counts for at least, and more: then it has to be exact.
    for seed, left in itertools.product(range(4), (0.24, 2.0)):
        apart = (left / positions) ** 0.5
        torch.manual_seed(seed)
        one = torch.full((width,), 0.5 + float(torch.rand(()))) if equal else torch.randn(width)
        away = one if equal else torch.randn(width)
        two = one - apart * away * one.norm() / away.norm()
        x = torch.stack([one, two]).repeat(positions // 2, 1)[None]
        clipped = BookkeepingGradients(Alternating(), fine(1e-3), FEW)
        norm = 1e3 * float(clipped(x, torch.zeros(1, dtype=torch.long)).norm())
        assert 0.97 * min(1.0, apart / 2 / Block.of(positions).floor) <= norm <= 1.0 + 5e-5


def test_positions_that_cancel_to_rounding_alone_keep_to_the_bound() -> None:
    """A float32 sum of what they come to by themselves is off by more than what is left of them."""

    class Total(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64, bias=False)
            self.head = nn.Linear(64, 2, bias=False).requires_grad_(False)
            with torch.no_grad():
                self.layer.weight.zero_()
                direction = torch.randn(64) * 1e4
                self.head.weight.copy_(torch.stack([direction, -direction]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer(x).sum(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    some = torch.randn(1, 15, 64)
    x = torch.cat([some, -some.sum(1, keepdim=True)], dim=1)
    clipped = BookkeepingGradients(Total(), fine(1e-3))
    assert float(clipped(x, torch.zeros(1, dtype=torch.long)).norm()) <= 1e-3 * (1.0 + SLACK)


def test_a_product_whose_factors_have_no_float32_squares_keeps_to_the_bound() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 2, bias=False).requires_grad_(False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1e18], [1e18]]).expand(2, 4))
    x, y = torch.full((1, 8), 2e-23), torch.zeros(1, dtype=torch.long)
    assert float(BookkeepingGradients(model, fine(1e-6))(x, y).norm()) <= 1e-6 * (1.0 + SLACK)


def rows_on_kinks(model: nn.Sequential, places: tuple[int, int], sizes: tuple[int, int]) -> torch.Tensor:
    """A row on the kinks of many ReLUs, where the last bit decides: in batches of these sizes, at these places."""
    inputs = model[0].in_features
    weight, bias = (parameter.detach().double() for parameter in model[0].parameters())
    found = torch.rand((1000, inputs)).double() * 2 - 1
    for _ in range(4):
        off = found @ weight.T + bias
        found = (found - off @ torch.linalg.pinv(weight).T).float().double()
    rows = found.float()
    with torch.no_grad():
        gates = [
            torch.stack([model[0](row.repeat(size, 1))[place] > 0 for row in rows])
            for place, size in zip(places, sizes, strict=True)
        ]
    return rows[(gates[0] != gates[1]).sum(1).argmax()]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("before", [0, 1024])
def test_a_row_more_does_not_change_the_gradients_of_others(engine: str, before: int) -> None:
    """Libraries round three rows unlike four."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(105, 64), nn.ReLU(), nn.Linear(64, 2))
    worst = rows_on_kinks(model, (0, 0), (3, 4))
    x = torch.cat([torch.rand((before, 105)) * 2 - 1, worst.repeat(3, 1), torch.rand((1, 105)) * 2 - 1])
    y = torch.zeros(len(x), dtype=torch.long)
    clipped = clipping_engine(engine, model, fine(1.0), ClippingOptions(microbatch_rows=1024))
    assert float((clipped(x, y) - clipped(x[:-1], y[:-1])).norm()) <= 1.0 + SLACK


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("inputs", "outputs"), [(105, 8), (105, 64), (14, 3)])
def test_a_row_in_front_does_not_change_the_gradients_of_others(engine: str, inputs: int, outputs: int) -> None:
    """They round by where in memory a row begins, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, 2))
    worst = rows_on_kinks(model, (0, 1), (16, 16))
    x = (torch.rand((1, inputs)) * 2 - 1).repeat(257, 1)
    x[1::4] = worst
    y = torch.zeros(len(x), dtype=torch.long)
    clipped = clipping_engine(engine, model, fine(1.0))
    others = clipped(x[1:].clone(), y[1:])  # a view would begin where the row in front ends
    assert float((clipped(x, y) - others).norm()) <= 1.0 + SLACK


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_sees_numbers_of_rows_that_were_tried_and_memory_of_its_own(engine: str) -> None:
    case = built("mlp", 200)
    clipped = clipping_engine(engine, case.model, fine(1.0), ClippingOptions(microbatch_rows=64))
    seen: list[tuple[int, int]] = []

    def see(_model: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        seen.append((len(inputs[0]), inputs[0].untyped_storage().data_ptr()))

    case.model.register_forward_pre_hook(see)
    clipped.ranges(case.x, case.y)
    tried = {rows for rows, _ in seen}
    seen.clear()
    for rows in range(1, 200, 7):
        clipped(case.x[:rows], case.y[:rows])
    assert {rows for rows, _ in seen} <= tried
    assert case.x.untyped_storage().data_ptr() not in {memory for _, memory in seen}
    assert len(seen) >= 29, "each batch was seen"


def test_a_word_that_a_row_repeats_moves_the_sum_of_many_by_the_bound() -> None:
    """Added one by one to a large sum, equal numbers all round the same way."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(3, 8), nn.Linear(8, 2, bias=False).requires_grad_(False)
            with torch.no_grad():
                self.words.weight.zero_()
                direction = torch.linspace(0.3, 0.5, 8)
                self.head.weight.copy_(torch.stack([direction, -direction]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(x).mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    clipped = BookkeepingGradients(Bag(), fine(1e-3))
    x, y = torch.zeros((1001, 256), dtype=torch.long), torch.zeros(1001, dtype=torch.long)
    assert 1e3 * float((clipped(x, y) - clipped(x[1:], y[1:])).norm()) <= 1.0 + SLACK
    x[0] = 2
    assert 1e3 * float((clipped(x, y) - clipped(x[1:], y[1:])).norm()) <= 1.0 + SLACK


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("microbatch_rows", [1, 16])
def test_gradients_that_are_not_contiguous(rows: int, microbatch_rows: int) -> None:
    class TextCnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer, self.head = nn.Embedding(50, 8), nn.Conv1d(8, 4, 3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer(self.words(x).transpose(1, 2)).amax(2))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    case = Case(TextCnn(), torch.randint(0, 50, (rows, 12)), torch.randint(0, 2, (rows,)))
    got = BookkeepingGradients(case.model, fine(0.1), ClippingOptions(microbatch_rows=microbatch_rows))(case.x, case.y)
    assert error(got, oracle(case, 0.1)[0]) <= 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_settings_that_round_products_are_refused(engine: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            with pytest.raises(InputError, match="rounded"):
                clipping_engine(engine, nn.Linear(2, 2), fine(1.0))
    finally:
        torch.set_float32_matmul_precision("highest")
    clipping_engine(engine, nn.Linear(2, 2), fine(1.0)).close()
    monkeypatch.setenv(name, "bf16")
    with pytest.raises(InputError, match="rounded"):
        clipping_engine(engine, nn.Linear(2, 2), fine(1.0))


def test_the_norm_of_a_million_equal_elements_is_not_rounded_down() -> None:
    layer = nn.Conv1d(1024, 1024, 3, groups=2, bias=False)  # groups are computed row by row
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(1024, 2, bias=False).requires_grad_(False))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[-0.11], [0.11]]).expand(2, 1024))
        layer.weight.zero_()
    clipped = BookkeepingGradients(model, fine(1.0), FEW)
    norm = float(clipped(torch.full((1, 1024, 3), 0.123), torch.zeros(1, dtype=torch.long)).norm())
    assert 1.0 - 1e-4 <= norm <= 1.0 + 1e-4


def test_per_layer_clipping_bounds_each_layer_and_so_the_whole() -> None:
    case = built("mlp")
    clipped = BookkeepingGradients(case.model, fine(0.3), ClippingOptions(per_layer=True))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in case.model if list(layer.parameters())]  # type: ignore[attr-defined]
    for i in range(len(case.x)):
        parts = clipped(case.x[i : i + 1], case.y[i : i + 1]).split(sizes)
        assert all(float(part.norm()) <= 0.3 / len(sizes) ** 0.5 for part in parts)
        gradient = _gradient(case, i).split(sizes)
        for part, whole in zip(parts, gradient, strict=True):
            expected = whole * min(1.0, 0.3 / len(sizes) ** 0.5 / float(whole.norm()))
            assert error(part, expected) <= 1e-5


def _gradient(case: Case, i: int) -> torch.Tensor:
    one = Case(case.model, case.x[i : i + 1], case.y[i : i + 1])
    return oracle(one, float("inf"))[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("microbatch_rows", [4, 1024])
def test_a_row_that_is_not_finite_has_no_weight_and_spoils_no_other(
    engine: str, poison: float, microbatch_rows: int
) -> None:
    case = built("mlp")
    clipped = clipping_engine(engine, case.model, fine(1.0), ClippingOptions(microbatch_rows=microbatch_rows))
    good = torch.ones(len(case.x), dtype=torch.bool)
    good[[0, 7, 8]] = False
    expected = clipped(case.x[good], case.y[good])
    poisoned = case.x.clone()
    poisoned[~good] = poison
    got = clipped(poisoned, case.y)
    assert torch.isfinite(got).all()
    if poison != 3e38:  # large but finite: allowed to count, clipped
        assert error(got, expected) <= 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_nothing_but_bad_rows_and_an_empty_batch_give_zero(engine: str) -> None:
    case = built("mlp")
    clipped = clipping_engine(engine, case.model, fine(1.0))
    assert clipped(torch.full_like(case.x, float("nan")), case.y).abs().max() == 0.0
    assert clipped(case.x[:0], case.y[:0]).abs().max() == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_left_over_for_the_next_batch(engine: str) -> None:
    case = built("mlp")
    clipped = clipping_engine(engine, case.model, fine(1.0))
    first = clipped(case.x, case.y)
    clipped(torch.full_like(case.x, float("nan")), case.y)
    clipped(case.x[:3], case.y[:3])
    assert all(parameter.grad is None for parameter in case.model.parameters())
    assert torch.equal(clipped(case.x, case.y), first)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closed_engine_leaves_the_model_as_it_was(engine: str) -> None:
    case = built("mlp")
    before = [sorted(vars(layer)) for layer in case.model.modules()]
    clipped = clipping_engine(engine, case.model, fine(1.0))
    clipped(case.x, case.y)
    clipped.close()
    assert [sorted(vars(layer)) for layer in case.model.modules()] == before
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in case.model.modules())


@pytest.mark.parametrize("second", ENGINES)
@pytest.mark.parametrize("first", ENGINES)
def test_a_model_has_one_engine_at_a_time(first: str, second: str) -> None:
    case = built("mlp")
    clipped = clipping_engine(first, case.model, fine(1.0))
    expected = clipped(case.x, case.y)
    for model in (case.model, nn.Sequential(case.model), copy.deepcopy(case.model)):
        with pytest.raises(InputError, match="has a clipping engine already") as refusal:
            clipping_engine(second, model, fine(1.0))
        assert "close that one" in refusal.value.hint
    assert torch.equal(clipped(case.x, case.y), expected)
    clipped.close()
    other = clipping_engine(second, case.model, fine(1.0))
    clipped.close()  # once more: that takes nothing off the other
    with pytest.raises(InputError, match="has a clipping engine already"):
        clipping_engine(first, case.model, fine(1.0))
    assert error(other(case.x, case.y), expected) <= 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_layers_are_left_alone(engine: str) -> None:
    case = built("mlp")
    case.model[0].requires_grad_(False)  # type: ignore[index,operator]  # it is a Sequential
    trainable = sum(p.numel() for p in case.model.parameters() if p.requires_grad)
    assert clipping_engine(engine, case.model, fine(1.0))(case.x, case.y).shape == (trainable,)


@pytest.mark.parametrize("name", ["convolutional", "strided", "signal", "tokens", "own"])
def test_one_compiled_graph_serves_every_batch_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`aot_eager` traces as inductor does, whole or not at all, and needs no C compiler."""
    graphs = 0

    def counting(graph: object, inputs: object) -> object:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=counting, **options))
    torch._dynamo.reset()
    case = built(name)
    clipped = BookkeepingGradients(case.model, fine(0.5), ClippingOptions(compiled=True, microbatch_rows=8))
    for rows in (23, 5, 16, 1):  # the last microbatch is padded and masked
        expected, _ = oracle(Case(case.model, case.x[:rows], case.y[:rows]), 0.5)
        assert error(clipped(case.x[:rows], case.y[:rows]), expected) <= 1e-5
    assert graphs == 1
    if case.x.is_floating_point():
        poisoned = case.x.clone()
        poisoned[2] = float("nan")
        keep = torch.arange(23) != 2
        assert error(clipped(poisoned, case.y), clipped(case.x[keep], case.y[keep])) <= 1e-6
        assert graphs == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_under_bfloat16_no_row_contributes_more_than_the_bound(name: str) -> None:
    """What is clipped is what bfloat16 computed; its norm is taken in float32."""
    case = built(name)
    clipped = BookkeepingGradients(case.model, fine(1e-2), ClippingOptions(autocast=torch.bfloat16))
    exact, _ = oracle(case, 1e-2)
    lengths = torch.stack([clipped(case.x[i : i + 1], case.y[i : i + 1]).norm() for i in range(len(case.x))])
    assert float(lengths.max()) <= 1e-2
    assert float(lengths.min()) >= 1e-2 * (1 - 1e-4), "each of these rows is clipped, to the bound and not below"
    assert error(clipped(case.x, case.y), exact) <= 0.1


class OwnProduct(nn.Module):
    """It multiplies by a parameter, and does not broadcast it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class OwnRepeated(nn.Module):
    """It takes a parameter for as many rows as there are, by repeating it: copies cannot be repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, 12)), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.token.repeat(len(x), 1))  # type: ignore[no-any-return]


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rows", [0, -1])
def test_a_microbatch_without_rows_is_refused(engine: str, rows: int) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        clipping_engine(engine, nn.Linear(3, 3), fine(1.0), ClippingOptions(microbatch_rows=rows))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4)), "'1' (BatchNorm1d) mixes the rows"),
        (nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4, affine=False)), "'1' (BatchNorm1d) mixes the rows"),
        (nn.Sequential(nn.Linear(12, 4), nn.InstanceNorm1d(4)), "'1' (InstanceNorm1d) mixes the rows"),
        (nn.Sequential(nn.Bilinear(2, 2, 2)), "'0' (Bilinear) cannot be trained"),
        (nn.Sequential(nn.LSTM(2, 2)), "'0' (LSTM) cannot be trained"),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), "'0' (MultiheadAttention) cannot be trained"),
        (nn.Sequential(nn.ConvTranspose2d(4, 2, 2)), "'0' (ConvTranspose2d) cannot be trained"),
        (nn.Sequential(OwnLinear(12, 3)), "'0' (OwnLinear) cannot be trained"),
        (nn.Sequential(nn.Linear(12, 3).to(torch.bfloat16)), "'0' (Linear) is not float32"),
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")), "with padding_mode='reflect'"),
        (nn.Sequential(nn.Embedding(4, 2, max_norm=1.0)), "with max_norm"),
        (nn.Sequential(nn.Embedding(4, 2, scale_grad_by_freq=True)), "with scale_grad_by_freq"),
        (nn.Sequential(nn.Embedding(4, 2, sparse=True)), "with sparse"),
        (nn.Sequential(nn.ReLU()), "no trainable parameter"),
    ],
)
def test_a_layer_without_a_known_per_row_gradient_is_refused_by_name(engine: str, model: nn.Module, told: str) -> None:
    with pytest.raises(InputError) as refusal:
        clipping_engine(engine, model, fine(1.0))
    assert told in refusal.value.message
    assert refusal.value.hint
    assert not any(layer._forward_hooks for layer in model.modules())


class OwnSummary(nn.Module):
    """What it does with all of a parameter, it would do with all rows' copies."""

    def __init__(self, summary: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.scale, self.body, self.head = nn.Parameter(torch.randn(22)), nn.Linear(12, 22), nn.Linear(22, 3)
        self.summary = summary

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(x)) * self.summary(self.scale))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (OwnProduct, "'0.weight'"),
        (OwnRepeated, "'0.token'"),
        (lambda: OwnSummary(torch.mean), "'0.scale'"),
        (lambda: OwnSummary(torch.amax), "'0.scale'"),
        (lambda: OwnSummary(lambda scale: scale - scale.mean()), "'0.scale'"),
    ],
)
def test_a_parameter_that_is_not_broadcast_over_rows_is_refused_by_name(
    model: Callable[[], nn.Module], told: str
) -> None:
    x, y = torch.randn(20, 12), torch.randint(0, 3, (20,))
    with pytest.raises(InputError, match=f"parameter {told} is not broadcast over rows"):
        BookkeepingGradients(nn.Sequential(model()), fine(1.0))(x, y)


def test_a_parameter_with_as_many_elements_as_a_batch_has_rows_is_not_taken_for_rows() -> None:
    """Its copies fit in several ways then: two numbers of rows tell which is meant."""
    for width in (2, 9, 16):  # the numbers of rows that shapes are tried with
        model = Patches(4, width - 1, width, 3)
        case = Case(model, torch.randn(23, width - 1, 4), torch.randint(0, 3, (23,)))
        expected, _ = oracle(case, 0.5)
        assert error(BookkeepingGradients(model, fine(0.5))(case.x, case.y), expected) <= 1e-5


def test_a_parameter_that_is_sliced_as_rows_would_be_is_refused_when_there_are_more() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.head = nn.Parameter(torch.randn(16, 4)), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((x + self.places[: x.shape[1]]).mean(1))  # type: ignore[no-any-return]

    x, y = torch.randn(23, 16, 4), torch.randint(0, 3, (23,))
    with pytest.raises(InputError, match="'places' is not broadcast over rows"):
        BookkeepingGradients(Sliced(), fine(1.0))(x, y)


def test_what_opacus_cannot_do_is_refused_there_and_done_by_the_other() -> None:
    padded = built("tied")
    with pytest.raises(InputError, match=r"layer 'words' .* cannot be trained by this engine"):
        clipping_engine("opacus", padded.model, fine(1.0))
    with pytest.raises(InputError, match=r"layer '' \(Patches\) cannot be trained by this engine"):
        clipping_engine("opacus", built("own").model, fine(1.0))
    with pytest.raises(InputError, match="clips flat"):
        clipping_engine("opacus", nn.Linear(3, 3), fine(1.0), ClippingOptions(per_layer=True))
    assert float(BookkeepingGradients(padded.model, fine(1.0))(padded.x, padded.y).norm()) > 0
    with pytest.raises(InputError, match="no such engine"):
        clipping_engine("jax", nn.Linear(3, 3), fine(1.0))


def test_an_output_that_is_changed_in_place_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with pytest.raises(InputError, match="output of layer '0' is changed in place"):
        BookkeepingGradients(model, fine(1.0))(torch.randn(3, 4), torch.tensor([0, 1, 0]))


def test_a_layer_that_is_called_without_the_rows_is_refused_by_name() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.head = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.words(x) + self.places(torch.arange(5))).mean(1))  # type: ignore[no-any-return]

    with pytest.raises(InputError, match="'places' is called on other rows"):
        BookkeepingGradients(Positions(), fine(1.0))(torch.zeros((3, 5), dtype=torch.long), torch.tensor([0, 1, 0]))


class Inverse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(1 / x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_is_not_finite_at_zero_loses_that_row_and_no_other(engine: str) -> None:
    model = Inverse()
    clipped = clipping_engine(engine, model, fine(1.0))
    x, y = torch.tensor([[0.0, 1.0], [1.0, 2.0], [0.0, 0.0], [2.0, 1.0]]), torch.tensor([0, 1, 0, 0])
    kept, bad = torch.tensor([1, 3]), torch.tensor([0, 2])
    got = clipped(x, y)
    assert not bool(clipped(x[bad], y[bad]).any())
    clipped.close()
    assert error(got, oracle(Case(model, x[kept], y[kept]), 1.0)[0]) <= 1e-5


def test_a_model_that_looks_at_places_is_refused_before_it_sees_a_row() -> None:
    class Moody(Inverse):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.index_fill(0, torch.tensor(0), torch.inf))  # type: ignore[no-any-return]

    with pytest.raises(InputError, match="computes a row otherwise"):
        BookkeepingGradients(Moody(), fine(1.0))(torch.ones(3, 2), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_device_that_was_refused_is_refused_again(engine: str) -> None:
    class Largest(Inverse):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x / x.abs().max())  # type: ignore[no-any-return]

    clipped = clipping_engine(engine, Largest(), fine(1.0))
    for _ in range(2):
        with pytest.raises(InputError, match="computes a row otherwise"):
            clipped(torch.ones(3, 2), torch.tensor([0, 1, 0]))


class Bag(nn.Module):
    """Of sequences, as long as they may be."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(16, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(x).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_another_length_than_those_that_were_tried_are_refused(engine: str) -> None:
    torch.manual_seed(0)
    model, x, y = Bag(), torch.randint(0, 16, (23, 12)), torch.randint(0, 2, (23,))
    clipped = clipping_engine(engine, model, fine(1.0))
    expected = clipped(x, y)
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    blocks = Blocks(spread(23), clipped.ranges(x, y))
    for others in (x[:, :11], torch.cat([x, x], 1), x.int()):
        for given in (None, blocks):
            with pytest.raises(InputError, match="another shape or type") as refusal:
                clipped(others, y, given)
            assert "one length" in refusal.value.hint
        with pytest.raises(InputError, match="another shape or type"):
            clipped.ranges(others, y)
    assert not seen, "the model saw none of them"
    hook.remove()
    assert torch.equal(clipped(x, y, blocks), expected)
    clipped.close()
    shorter = clipping_engine(engine, model, fine(1.0))
    assert error(shorter(x[:, :11], y), oracle(Case(model, x[:, :11], y), 1.0)[0]) <= 1e-5


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_bound_that_is_none_is_refused(engine: str, bound: float) -> None:
    with pytest.raises(ValueError, match="max_grad_norm"):
        clipping_engine(engine, nn.Linear(2, 2), fine(bound))


def test_both_engines_keep_one_contract() -> None:
    case = built("mlp")
    sums = []
    for engine in ENGINES:
        clipped: ClippedGradients = clipping_engine(engine, case.model, fine(0.2))
        sums.append(clipped(case.x, case.y))
        clipped.close()
    assert sums[0].dtype == sums[1].dtype == torch.float64
    assert error(sums[0], sums[1]) <= 1e-5
