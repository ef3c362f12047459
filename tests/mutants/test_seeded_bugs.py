"""Does the suite notice? Each bug below is put into a copy of the package, and tests that guard its place must fail.

A bug is a text and what takes its place; the text must be there exactly once, so that no bug silently stops being one.
Every one of these was made in some differential-privacy library or is the obvious slip (arXiv 2602.17454 and the list
of pitfalls in jax_privacy). The copy is imported in place of the package; nothing of the tests is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "platform" / "cloister"
TIMEOUT_S = 600
TESTS_FAILED = 1  # pytest's exit code


@dataclass(frozen=True, slots=True)
class Bug:
    name: str
    file: str
    text: str
    bug: str
    guard: str
    only: str = ""


CLIPPING, LOOP = "tests/unit/test_privacy_clipping.py", "tests/unit/test_loop.py"
ONE_ROW = "tests/attacks/test_one_row.py"
STREAMS, ACCOUNTING = "tests/unit/test_privacy_streams.py", "tests/unit/test_privacy_accounting.py"
ATTEMPTS, SEALS = "tests/unit/test_authority_attempts.py", "tests/unit/test_authority_seals.py"
WORK, GRID = "tests/unit/test_work.py", "tests/unit/test_privacy_grid.py"
EVALUATION, REHEARSAL = "tests/unit/test_privacy_evaluation.py", "tests/unit/test_rehearsal.py"
ORDINALS, RENYI = "tests/unit/test_ordinals.py", "tests/unit/test_privacy_renyi.py"
POPULATIONS, RUNS = "tests/unit/test_authority_populations.py", "tests/unit/test_authority_runs.py"
TRIED = "    trial = on_each_rank(group, lambda: try_out(run, attempt, group))  # 2\n"
LEASED = "    lease = authority.lease_shards(run, attempt.number, group.rank, code_digest)  # 3\n"

BUGS = (
    Bug("no clip", "privacy/clipping.py",
        "weights_LB = mask_B * (self._bound / norms_LB.clamp_min(self._bound))",
        "weights_LB = mask_B + 0.0 * norms_LB", CLIPPING, "more_than_the_bound"),
    Bug("the mean in place of the sum", "privacy/clipping.py",
        "torch.autograd.grad(losses_B.sum(), [", "torch.autograd.grad(losses_B.mean(), [", CLIPPING, "row_by_row"),
    Bug("double accumulation", "privacy/opacus_engine.py",
        "        self._by_row.zero_grad(set_to_none=True)\n", "        pass\n",
        CLIPPING, "left_over"),
    Bug("rows that are not finite", "privacy/clipping.py",
        "finite_B = torch.isfinite(losses_B) & torch.isfinite(norms_LB).all(0)",
        "finite_B = torch.ones_like(losses_B, dtype=torch.bool)", CLIPPING, "not_finite"),
    Bug("norms in bfloat16", "privacy/gradients.py", "    return _at_least_single(a) @ _at_least_single(b)\n",
        "    return (a.bfloat16() @ b.bfloat16()).float()\n", CLIPPING, "row_by_row"),
    Bug("a bias is skipped", "privacy/layers.py",
        '{"weight": Products(a_BTD, g_BTP, layer.weight.shape, bias), "bias": bias}',
        '{"weight": Products(a_BTD, g_BTP, layer.weight.shape, bias)}', CLIPPING, "row_by_row"),
    Bug("long sums in one piece", "privacy/gradients.py", "_PIECE = 1024", "_PIECE = 2**30", CLIPPING, "million"),
    Bug("an unknown layer is passed over", "privacy/clipping.py",
        'raise InputError(f"{label} cannot be trained privately", f"freeze it, or build it from {known}")',
        "continue", CLIPPING, "refused_by_name"),
    Bug("a module's own parameter is tried with copies that are all alike", "privacy/broadcast.py",
        "numbers = torch.randn((rows, *own.parameter.shape), generator=generator)",
        "numbers = torch.randn((1, *own.parameter.shape), generator=generator).repeat(\n"
        "        rows, *[1] * own.parameter.dim()\n    )", CLIPPING, "not_broadcast"),
    Bug("a device is tried with the same rows beside each", "privacy/microbatch.py",
        "_elsewhere(len(x), fills, x.device)", "_elsewhere(most, fills, x.device)",
        ONE_ROW, "largest"),
    Bug("a module's own parameter is left out", "privacy/clipping.py",
        "for own, copy in self._own.copies(len(x))", "for own, copy in self._own.copies(len(x))[:1]", CLIPPING,
        "row_by_row"),
    Bug("cancellation is not guarded", "privacy/gradients.py", "CANCELLED = 0.05", "CANCELLED = 0.0",
        CLIPPING, "cancel"),
    Bug("a row whose positions cancel counts for what is left", "privacy/gradients.py",
        "return Squares(found.value, found.scale, (floor * apart_B).square())",
        "return Squares(found.value, found.scale)", CLIPPING, "cancel"),
    Bug("the parts of a repeated word are added one by one", "privacy/gradients.py",
        "grid.round(self.added() * weights_B[:, None, None])",
        "grid.round(_at_least_single(self.g_BTD) * weights_B[:, None, None])", CLIPPING, "a_word"),
    Bug("sums beside the grid", "privacy/grid.py", "return values.mul_(1.0 / self.unit).round_()",
        "return values.mul_(1.0 / self.unit)", GRID, "whole_units"),
    Bug("blocks in the order of the rows", "privacy/mechanism.py", "places_of(x_ND, y_N, key(\"places\"))",
        "spread(len(x_ND))", "tests/unit/test_mechanism.py", "own_part"),
    Bug("blocks as large as a microbatch", "privacy/gradients.py",
        "MOST_ROWS if self._instantiated else self._block.rows", "MOST_ROWS", GRID, "several_positions"),
    Bug("microbatches of any number of rows", "privacy/microbatch.py",
        "            return rows, step\n", "            return rows, 1\n", CLIPPING, "memory_of_its_own"),
    Bug("microbatches where they are in the batch", "privacy/microbatch.py",
        "    x, y = (torch.cat([t, t[:1].expand(rows - len(t), *t.shape[1:])]) for t in (x, y))\n",
        "    if len(x) < rows:\n"
        "        x, y = (torch.cat([t, t[:1].expand(rows - len(t), *t.shape[1:])]) for t in (x, y))\n",
        CLIPPING, "memory_of_its_own"),
    Bug("rows of any length", "privacy/microbatch.py", "if kind_of(x_ND, y_N) != kind:", "if False:", CLIPPING,
        "another_length"),
    Bug("squares in an order that follows the rows", "privacy/gradients.py",
        "    return functools.reduce(torch.add, parts)\n", "    return torch.stack(list(parts)).sum(0)\n", ONE_ROW,
        "many_parameters"),
    Bug("sums in the order of memory", "privacy/layers.py", "a.contiguous(), use.g.contiguous()", "a, use.g",
        ONE_ROW, "time_first or not_finite"),
    Bug("a device is tried with the weights at hand", "privacy/microbatch.py",
        "weight.copy_(torch.randn(kept.shape, generator=generator) / math.sqrt(max(1.0, inputs)))", "pass", ONE_ROW,
        "tried"),
    Bug("a device is tried with a model that does not train", "privacy/microbatch.py",
        "        model.train()\n        for dropping", "        model.eval()\n        for dropping", ONE_ROW,
        "as_it_trains"),
    Bug("a device is tried with numbers that are none", "privacy/microbatch.py",
        "if 2 * int(finite_B.sum()) < len(x):", "if False:", ONE_ROW, "as_it_trains"),
    Bug("operations are not watched", "privacy/microbatch.py",
        "_is_alike(computed, public, most, fills) and _is_alike_when_watched(passed, public, most, fills)",
        "_is_alike(computed, public, most, fills)", ONE_ROW, "layers_hide"),
    Bug("operations are watched on the way forward alone", "privacy/watching.py",
        "        if traits.view:\n", "        if traits.view or not torch.is_grad_enabled():\n", ONE_ROW,
        "layers_hide"),
    Bug("a device is tried with positive numbers", "privacy/microbatch.py",
        "if x.is_floating_point():\n            sizes", "if False:\n            sizes", ONE_ROW, "tried"),
    Bug("a device is tried for one parameter alone", "privacy/clipping.py",
        "return [weighed.squares, *(each for part in parts for each in part)]", "return [weighed.squares[:, -1:]]",
        ONE_ROW, "tried_with_all"),
    Bug("what cancels in a tied weight counts for what is left", "privacy/gradients.py",
        "one.scale + other.scale, least_B)", "one.scale + other.scale, other.least)", ONE_ROW, "tied"),
    Bug("long products in one piece", "privacy/gradients.py", "_PRODUCT_PIECE = 4096", "_PRODUCT_PIECE = 2**30",
        ONE_ROW, "million"),
    Bug("rows that fill a product up keep their weights", "privacy/gradients.py",
        "functional.pad(weights, (0, 0, 0, 0, 0, missing))",
        "weights_B[rows.start : rows.stop + missing, None, None] if missing else weights", GRID, "one_sum"),
    Bug("compiled microbatches of several blocks", "privacy/clipping.py",
        "together = 0 if self._options.compiled else self._rows", "together = self._rows", GRID, "one_block"),
    Bug("words of eight bytes", "privacy/blocks.py", "min(rows.element_size(), 4)", "rows.element_size()", GRID,
        "follows"),
    Bug("noise beside the grid", "privacy/noise.py", "pairs_N2H.mul_(radius_NH.unsqueeze(1)).round_()",
        "pairs_N2H.mul_(radius_NH.unsqueeze(1))", STREAMS, "whole_units"),
    Bug("radii of 53 bits", "privacy/noise.py", "_ANGLE_BITS, _RADIUS_BITS = 53, 63",
        "_ANGLE_BITS, _RADIUS_BITS = 53, 53", STREAMS, "smallest_radii"),
    Bug("radii are not blurred", "privacy/noise.py", "_DITHER, _DITHER_BITS = 2.0**-8, 24",
        "_DITHER, _DITHER_BITS = 2.0**-8, 0", STREAMS, "blurred"),
    Bug("ranks share the variance twice", "privacy/mechanism.py",
        "noise_std(plan) / math.sqrt(world_size)", "noise_std(plan) / world_size", LOOP, "adds_up"),
    Bug("noise forgets the clipping norm", "privacy/mechanism.py",
        "plan.noise_multiplier * plan.max_grad_norm *", "plan.noise_multiplier *", LOOP, "adds_up"),
    Bug("noise forgets what rounding adds", "privacy/mechanism.py",
        "plan.max_grad_norm * (1 + SLACK)", "plan.max_grad_norm", "tests/unit/test_mechanism.py", "slack"),
    Bug("division by the realised batch", "training/loop.py",
        "set_gradients(parameters, sum_P, plan.expected_batch_size)",
        "set_gradients(parameters, sum_P, max(1, len(rows_B)))", LOOP, "empty"),
    Bug("an empty batch is no step", "training/loop.py", "            rows_B = mechanism.sample()  # 2\n",
        "            rows_B = mechanism.sample()  # 2\n            if len(rows_B) == 0:\n                continue\n",
        LOOP, "empty"),
    Bug("noise before the record", "training/loop.py", "                commit_block(step, block_end)  # 1\n",
        "                pass\n", LOOP, "before"),
    Bug("a higher sample rate than planned", "privacy/sampling.py",
        "PoissonSampler(rows, sample_rate, key_of(name))",
        "PoissonSampler(rows, min(1.0, 1.5 * sample_rate), key_of(name))",
        "tests/unit/test_privacy_auditing.py", "real_step"),
    Bug("shuffled batches", "privacy/sampling.py",
        "        return self._by_blocks() if self._blockwise else self._by_rows()\n",
        "        size = max(1, round(self._n * self._threshold / 2**64))\n"
        "        return np.sort(np.argsort(self._stream.words(self._n))[:size])\n",
        STREAMS, "inclusion or empty or rate"),
    Bug("batches and places come from one draw", "privacy/keystream.py", "self._draw += 1", "self._draw += 0",
        REHEARSAL, "to_be_expected"),
    Bug("keys before the trial", "training/work.py", TRIED + LEASED, LEASED + TRIED, WORK, "before"),
    Bug("a rank that cannot train leaves the others to it", "training/work.py",
        "on_each_rank(group, lambda: try_out(run, attempt, group))", "try_out(run, attempt, group)",
        WORK, "before_any"),
    Bug("an engine that clips to another plan's norm", "privacy/mechanism.py",
        "if model is not self._model or grid != self._grid:", "if model is not self._model:",
        "tests/unit/test_mechanism.py", "tried_before"),
    Bug("progress is told in the middle of a block", "training/work.py",
        "        if steps % block_steps and done != plan.steps:\n            return\n", "", WORK, "whole_blocks"),
    Bug("every step has the same noise", "privacy/noise.py", "rank=self._rank, step=step\n",
        "rank=self._rank, step=0\n", STREAMS, "noise"),
    Bug("randomness is restored after a death", "training/work.py", "secret=fresh_secret(),", "secret=bytes(32),",
        WORK, "in_common or sampled_alike"),
    Bug("a delta ten times as large", "privacy/accounting.py",
        "accountant.get_epsilon(delta, eps", "accountant.get_epsilon(10 * delta, eps", ACCOUNTING),
    Bug("fewer steps than are run", "privacy/accounting.py", "one.self_compose(steps)",
        "one.self_compose(max(1, steps // 2))", ACCOUNTING),
    Bug("the ledger forgets what died", "authority/attempts.py", "committed = row.steps_committed + last - first",
        "committed = last", ATTEMPTS, "again"),
    Bug("keys for a ledger that was put back or cleared", "authority/ledger_seals.py", "    if problem:\n",
        "    if not number:\n", SEALS, "was_edited"),
    Bug("nobody is asked whether the same people have a budget already", "authority/populations.py",
        "(ledgers.c.owner == row.owner) & (ledgers.c.id != mine)", "ledgers.c.owner == ''", POPULATIONS,
        "officers_answer"),
    Bug("an answer to another question", "authority/overlap.py", "    if request.details != ",
        "    if not request.details and request.details != ", POPULATIONS, "what_there_was"),
    Bug("a ledger that is hidden for a moment", "authority/overlap.py",
        "        ledger_seals.require_whole(act, known)\n", "        pass\n", POPULATIONS, "deleted_or_hidden"),
    Bug("which versions share a ledger is under no seal", "authority/ledger_seals.py",
        '"datasets": sorted([row.dataset, row.version] for row in joined),', '"datasets": [],', POPULATIONS,
        "moves_no_dataset"),
    Bug("what a run is on is under no seal", "authority/ledger_seals.py",
        "row.dataset, row.version, row.steps_committed", "row.steps_committed", POPULATIONS, "no_other_data"),
    Bug("a ledger is taken for one of before there were seals", "authority/ledger_seals.py",
        "name not in logged and all(map(_is_older, logged))", "name not in logged", POPULATIONS, "not_adopted"),
    Bug("a first budget without a ceiling", "authority/data.py",
        "approve = epsilon > self._approvals.required.budget_from", "approve = False", POPULATIONS, "ceiling"),
    Bug("two rules with all of delta", "authority/ledger.py",
        "return self.delta if self.spent.curve is None else self.delta / 2", "return self.delta", RUNS, "over_budget"),
    Bug("a filter that sees the last run alone", "authority/ledger.py", "renyi.total(curves)",
        "renyi.total(curves[-1:])", RUNS, "need_not_add_up"),
    Bug("weights of more than one in all", "privacy/renyi.py", "near / near.sum() + (1 - _NEAR) / len(ORDERS)",
        "near / near.sum() + 1.0", RENYI, "adversary or supermartingale"),
    Bug("who is held out costs the filter nothing", "privacy/renyi.py", "max(_up(steps * each), other)",
        "_up(steps * each + 0 * other)", RENYI, "its_evaluation"),
    Bug("adding a unit costs nothing", "privacy/renyi.py", "c, rise = -z * z / 2 - less * log_f,",
        "c, rise = -z * z / 2 - 0 * log_f,", RENYI, "bounded_by_itself"),
    Bug("a settled run is opened again", "authority/runs.py",
        'return "settled" if row.settled else str(row.state)', "return str(row.state)", SEALS, "opened_again"),
    Bug("a refund without proof", "signing/run_end.py",
        "    verified = dsse.verify(envelope, trusted, predicate_type=RUN_END_PREDICATE,"
        " subject_digest=_digest(plan))\n    said = verified.predicate\n",
        "    import base64, json\n    said = json.loads(base64.b64decode(envelope['payload']))['predicate']\n",
        ATTEMPTS, "own_word"),
    Bug("stopping gives back at once", "authority/ends.py",
        '                close(act.connection, run, "stopped", None, self._core.clock())\n',
        '                close(act.connection, run, "stopped", None, self._core.clock())\n'
        "                with ledger_seals.changing(act, row.ledger):\n"
        "                    mine = runs.c.id == run\n"
        "                    act.connection.execute(update(runs).where(mine).values(epsilon_charged=0.0))\n",
        ATTEMPTS, "stops_a_run"),
    Bug("a run that has begun is charged nothing when it is stopped", "authority/ends.py",
        "return not (row.settled or row.attempt or row.steps_committed or leased)", "return not row.settled",
        ATTEMPTS, "exactly_one or began_and"),
    Bug("a step of the clock ends what is about to begin", "authority/ends.py", "if now - since >= CERTAIN_S)",
        "if now - since >= 0)", ATTEMPTS, "step_of_the_clock"),
    Bug("an evaluation of rows as they come", "privacy/rowwise.py", "rounded_up(len(x_BD), self._step)", "len(x_BD)",
        EVALUATION, "were_tried"),
    Bug("one draw of noise for all cells", "privacy/evaluation.py",
        "noise = [geometric.noise(self.epsilon, self.rows_per_unit, source) for _ in range(counts.size)]",
        "noise = [geometric.noise(self.epsilon, self.rows_per_unit, source)] * counts.size",
        EVALUATION, "every_cell"),
    Bug("an evaluation for one row of a unit", "privacy/evaluation.py",
        "geometric.noise(self.epsilon, self.rows_per_unit, source)", "geometric.noise(self.epsilon, 1, source)",
        EVALUATION, "several_rows"),
    Bug("noise of one sign", "privacy/geometric.py", "return -size if negative else size", "return size",
        EVALUATION, "two_sided"),
    Bug("an evaluation that costs nothing", "authority/costs.py",
        "held_out * plan.evaluation_epsilon", "0 * held_out", "tests/unit/test_authority_units.py", "cost_both"),
    Bug("rows of a unit beyond those that the noise is for", "training/rows.py", "used = ordinals < self._used",
        "used = ordinals >= 0", ORDINALS, "no_more_rows"),
    Bug("the first visits of each patient", "datasets/ordinals.py", "np.lexsort((words_N, units_N))",
        "np.lexsort((np.arange(len(units_N)), units_N))", ORDINALS, "chance"),
    Bug("what is appended is numbered from zero again", "datasets/ordinals.py",
        "ordinals_M[last_N].astype(np.int64) + 1, 0)", "0, 0)", ORDINALS, "appended"),
    Bug("a cap for data without ordinals", "authority/costs.py", "if not manifest.numbered:", "if False:", ORDINALS,
        "before_there_were"),
)  # fmt: skip


def run_guard(package: Path, bug: Bug) -> subprocess.CompletedProcess[str]:
    """The guarding tests, against `package` in place of the real one."""
    path = f"pythonpath={package.parent} tests"
    only = ["-k", bug.only] if bug.only else []
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", path, *only, bug.guard],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(package.parent)},
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_seeded_bug_is_caught(bug: Bug, tmp_path: Path) -> None:
    copy = tmp_path / "platform" / "cloister"
    shutil.copytree(PACKAGE, copy)  # with what is compiled: Python compares the times of the sources
    source = (copy / bug.file).read_text()
    assert source.count(bug.text) == 1, "the bug has to be put in anew: its place has changed"
    (copy / bug.file).write_text(source.replace(bug.text, bug.bug))
    done = run_guard(copy, bug)
    assert done.returncode == TESTS_FAILED, done.stdout[-2000:] + done.stderr[-2000:]
    assert "failed" in done.stdout.rpartition("\n=")[2] or "FAILED" in done.stdout


def test_the_guards_are_the_suites_own_tests() -> None:
    assert all((REPOSITORY / bug.guard).is_file() for bug in BUGS)
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 26
