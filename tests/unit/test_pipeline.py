"""The decision path of one request, without a server."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cloister.errors import (
    AuthenticationError,
    InputError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
    TokenExpiredError,
    UnavailableError,
)
from cloister.serving import tables
from cloister.serving.connect import cedar_authorizer
from cloister.serving.pipeline import Authorizer, Pipeline
from cloister.serving.quota import RECHECK_S, Block, Quota
from cloister.serving.release import verify_release
from cloister.signing import keys
from cloister.signing.tokens import INFERENCE_AUDIENCE, Claims, TokenVerifier
from serving_world import (
    GOOD_COLUMNS,
    ISSUER,
    MODEL,
    NOW,
    RELEASE_KEY,
    FakeAuthority,
    TokenMaker,
    allow_all,
    body,
    signed_release,
)

MAKER = TokenMaker()
VERIFIED = verify_release(
    signed_release(),
    name=MODEL,
    release_key_pem=keys.public_to_pem(RELEASE_KEY.public_key()),
    required_approvals=2,
    now=NOW,
)
SECRET = "Sekretariatswert"


def fail(error: Exception) -> Any:
    raise error


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Source:
    """`QuotaSource` over the fake authority; counts how many calls run at once."""

    def __init__(self, authority: FakeAuthority) -> None:
        self.authority = authority
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def take_block(self, subject: str, wanted: int) -> Block:
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        granted, window_ends = self.authority.take_quota_block("ep-1", subject, wanted)
        with self.lock:
            self.at_once -= 1
        return Block(granted=granted, window_ends=window_ends)


class Live:
    """`Liveness` that says what it is told to, and remembers whom it was asked about."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked: list[Claims] = []

    def require_live(self, claims: Claims) -> None:
        self.asked.append(claims)
        if self.error:
            raise self.error


class World:
    def __init__(self, *, budget: int = 10_000, block: int = 100, authorize: Authorizer = allow_all) -> None:
        self.live = Live()
        self.clock = Clock()
        self.authority = FakeAuthority(signed_release(), budget)
        self.source = Source(self.authority)
        self.steady = Clock()
        self.quota = Quota(self.source, block_size=block, clock=self.clock, steady=self.steady)
        self.pipeline = Pipeline(
            VERIFIED,
            verifier=TokenVerifier({"k1": MAKER.public}, issuer=ISSUER, audience=INFERENCE_AUDIENCE),
            liveness=self.live,
            authorize=authorize,
            quota=self.quota,
            decimals=2,
            clock=self.clock,
        )

    async def ask(self, request: Any = None, token: str | None = None, model: str = MODEL) -> dict[str, Any]:
        data = request if isinstance(request, bytes) else json.dumps(request or body()).encode()
        claims = self.pipeline.admit(f"Bearer {token or MAKER.token()}", model)
        return await self.pipeline.infer(claims, data)


def ask(world: World, request: Any = None, **arguments: Any) -> dict[str, Any]:
    return asyncio.run(world.ask(request, **arguments))


def test_an_answer_is_a_label_and_a_rounded_probability_and_nothing_else() -> None:
    answer = ask(World(), body(id="q-1"))
    assert answer == {
        "id": "q-1",
        "model_name": MODEL,
        "model_version": VERIFIED.root_digest[:16],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["yes", "no"]},
            {"name": "probability", "datatype": "FP64", "shape": [2, 1], "data": [0.92, 0.94]},
        ],
    }


def test_only_the_outputs_that_were_asked_for() -> None:
    answer = ask(World(), body(outputs=[{"name": "label", "parameters": {"binary_data": False}}]))
    assert [output["name"] for output in answer["outputs"]] == ["label"]
    assert "id" not in answer


class TestIdentity:
    @pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic YTpi", "Bearer a.b.c", MAKER.token()])
    def test_nobody(self, header: str | None) -> None:
        with pytest.raises(AuthenticationError):
            World().pipeline.admit(header, MODEL)

    def test_an_expired_token(self) -> None:
        with pytest.raises(TokenExpiredError):
            ask(World(), token=MAKER.token(now=NOW - 300))

    def test_a_token_of_another_issuer_audience_or_key(self) -> None:
        for token in (
            MAKER.token(issuer="https://evil"),
            MAKER.token(audience="urn:cloister:authority"),
            TokenMaker().token(),
        ):
            with pytest.raises(AuthenticationError):
                ask(World(), token=token)

    @pytest.mark.parametrize("error", [AuthenticationError("revoked"), UnavailableError("who knows")])
    def test_a_token_that_may_have_ended_asks_no_policy_and_costs_nothing(self, error: Exception) -> None:
        world = World(authorize=lambda *_: fail(AssertionError("the policy was asked")))
        world.live.error = error
        with pytest.raises(type(error)):
            ask(world)
        with pytest.raises(type(error)):  # nor does it learn which models exist
            ask(world, model="no-such-model")
        assert [claims.subject for claims in world.live.asked] == ["dora", "dora"]
        assert world.authority.used == {}

    def test_strangers_do_not_learn_which_models_exist(self) -> None:
        with pytest.raises(AuthenticationError):
            World().pipeline.admit(None, "no-such-model")
        with pytest.raises(NotFoundError):
            ask(World(), model="no-such-model")

    def test_the_policy_is_asked_with_what_the_token_proved(self) -> None:
        asked: list[tuple[object, ...]] = []

        def refuse(*question: object) -> None:
            asked.append(question)
            raise PermissionDeniedError("no")

        world = World(authorize=refuse)
        with pytest.raises(PermissionDeniedError):
            ask(world)
        assert asked == [("dora", "person", frozenset({"consumer"}), "model:infer")]
        assert world.authority.used == {}

    def test_the_shipped_policy_lets_consumers_ask_and_nobody_else(self) -> None:
        world = World(authorize=cedar_authorizer(VERIFIED, "income@1", ""))
        assert ask(world)["outputs"]
        for roles in ([], ["engineer"], ["operator", "reviewer"], ["consumer", "endpoint"]):
            with pytest.raises(PermissionDeniedError):
                ask(world, token=MAKER.token(roles=roles))


def tensor(**changes: Any) -> dict[str, Any]:
    """A good request whose `age` is changed; a None removes the field."""
    good = {"name": "age", "shape": [2], "datatype": "INT64", "data": [90, 5]} | changes
    rest = body()["inputs"][1:]
    return {"inputs": [{name: value for name, value in good.items() if value is not None}, *rest]}


BAD_REQUESTS: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "JSON"),
    "not UTF-8": (b"\xff\xfe", "JSON"),
    "empty": (b"", "JSON"),
    "a list": (b"[]", "object"),
    "deep": (b'{"inputs":' + b"[" * 100_000, "JSON"),
    "NaN": (json.dumps(tensor(data=[float("nan"), 1])).encode(), "JSON"),
    "infinity by exponent": (
        json.dumps(body(GOOD_COLUMNS | {"hours": [1, 2]})).replace("[1, 2]", "[1, 1e999]").encode(),
        "column `hours` holds",
    ),
    "a field twice": (b'{"inputs":[],"inputs":[]}', "JSON"),
    "an unknown field": (body(model="x"), "field"),
    "no inputs": ({"id": "x"}, "inputs"),
    "inputs no list": ({"inputs": {}}, "inputs"),
    "no columns": ({"inputs": []}, "age"),
    "an id that is no string": (body(id=7), "id"),
    "an endless id": (body(id="x" * 129), "id"),
    "a missing column": (body({"age": [1], "job": ["clerk"]}), "hours"),
    "an unknown column": (body(GOOD_COLUMNS | {SECRET: ["a", "b"]}), "not a column"),
    "a column twice": ({"inputs": [*body()["inputs"], body()["inputs"][0]]}, "age"),
    "a tensor that is no object": ({"inputs": [7]}, "tensor"),
    "a tensor without name": ({"inputs": [{"shape": [1]}]}, "name"),
    "no shape": (tensor(shape=None), "shape"),
    "no data": (tensor(data=None), "data"),
    "another field in a tensor": (tensor(extra=1), "age"),
    "binary data": (tensor(data=None, parameters={"binary_data_size": 16}), "JSON, not as binary"),
    "shape [N, 2]": (tensor(shape=[2, 2]), "shape"),
    "shape []": (tensor(shape=[]), "shape"),
    "shape of three": (tensor(shape=[2, 1, 1]), "shape"),
    "shape true": (tensor(shape=[True]), "shape"),
    "shape too large": (tensor(shape=[3]), "3 rows"),
    "negative shape": (tensor(shape=[-1]), "-1 rows"),
    "columns of unequal length": (body(GOOD_COLUMNS | {"hours": [1.0]}), "hours"),
    "no rows": (body({name: [] for name in GOOD_COLUMNS}), "1 to 1024"),
    "too many rows": (body({"age": [1] * 1025, "job": ["clerk"] * 1025, "hours": [1.0] * 1025}), "1 to 1024"),
    "another datatype": (tensor(datatype="BYTES", data=["1", "2"]), "INT32 or INT64"),
    "an unknown datatype": (tensor(datatype="FP8"), "INT32 or INT64"),
    "a datatype that is no string": (tensor(datatype=["INT64"]), "INT32 or INT64"),
    "a string in a number column": (tensor(data=[SECRET, 1]), "INT64"),
    "a bool in a number column": (tensor(data=[True, 1]), "INT64"),
    "a float in an integer column": (tensor(data=[1.5, 1]), "INT64"),
    "a null": (tensor(data=[None, 1]), "INT64"),
    "more than 64 bits": (tensor(data=[2**63, 1]), "INT64"),
    "more than 32 bits": (tensor(datatype="INT32", data=[2**31, 1]), "INT32"),
    "a number with 5000 digits": (json.dumps(tensor()).replace("90", "9" * 5000).encode(), "JSON"),
    "nested where flat is needed": (tensor(data=[[90], [5]]), "INT64"),
    "out of bounds": (tensor(data=[1, 4711]), "age"),
    "not one of the values": (body(GOOD_COLUMNS | {"job": ["clerk", SECRET]}), "job"),
    "a novel as a value": (body(GOOD_COLUMNS | {"job": ["clerk", "x" * 2000]}), "job"),
    "an unknown output": (body(outputs=[{"name": "logits"}]), "output"),
    "an output twice": (body(outputs=[{"name": "label"}] * 2), "twice"),
    "no output": (body(outputs=[]), "outputs"),
    "unknown parameters": (body(parameters={"priority": 1}), "parameters"),
}


class TestInput:
    def test_a_bad_request_is_refused_without_cost_and_without_an_echo(self, subtests: pytest.Subtests) -> None:
        for case, (request, message) in BAD_REQUESTS.items():
            with subtests.test(case):
                world = World()
                with pytest.raises(InputError) as caught:
                    ask(world, request)
                assert message in caught.value.message + caught.value.hint
                for value in (SECRET, "4711", "novel", "999"):
                    assert value not in str(caught.value.args)
                assert world.authority.used == {}

    def test_what_the_protocol_allows_is_accepted(self) -> None:
        good = body(parameters={"binary_data_output": True})  # what tritonclient sends
        good["inputs"][0] |= {"shape": [2, 1], "data": [[90], [5]], "parameters": {}}
        good["inputs"][2] |= {"shape": [2, 1], "datatype": "INT32", "data": [40, 10]}
        assert ask(World(), good)["outputs"][0]["data"] == ["yes", "no"]

    def test_the_order_of_columns_does_not_matter(self) -> None:
        shuffled = {"inputs": body()["inputs"][::-1]}
        assert ask(World(), shuffled)["outputs"] == ask(World())["outputs"]

    def test_as_many_rows_as_allowed(self) -> None:
        rows = tables.MAX_ROWS
        answer = ask(World(), body({"age": [1] * rows, "job": ["clerk"] * rows, "hours": [1.0] * rows}))
        assert len(answer["outputs"][0]["data"]) == rows


class TestQuota:
    def test_one_row_is_one_unit_and_blocks_are_reused(self) -> None:
        world = World(block=5)

        async def story() -> None:
            for _ in range(4):
                await world.ask()  # two rows each

        asyncio.run(story())
        assert world.authority.asked == [("ep-1", "dora", 5), ("ep-1", "dora", 5)]

    def test_over_the_quota_says_when_to_come_back(self) -> None:
        world = World(budget=3, block=100)

        async def story() -> None:
            await world.ask()
            world.clock.now += 20.5
            with pytest.raises(QuotaExceededError) as caught:
                await world.ask()
            assert caught.value.retry_after_s == 40  # 39.5, rounded up
            await world.ask(body({name: values[:1] for name, values in GOOD_COLUMNS.items()}))  # one unit is left
            with pytest.raises(QuotaExceededError):
                await world.ask()

        asyncio.run(story())
        assert world.authority.used == {"dora": 3}

    def test_a_refusal_is_repeated_without_asking_and_before_the_body_is_read(self) -> None:
        world = World(budget=2)

        async def story() -> None:
            await world.ask()
            for _ in range(10):
                with pytest.raises(QuotaExceededError):
                    await world.ask()
            asked = len(world.authority.asked)
            with pytest.raises(QuotaExceededError):
                world.pipeline.admit(f"Bearer {MAKER.token()}", MODEL)
            assert len(world.authority.asked) == asked == 2
            world.steady.now += RECHECK_S
            world.authority.budget = 10
            await world.ask()

        asyncio.run(story())

    def test_a_clock_that_is_set_back_prolongs_no_refusal(self) -> None:
        world = World(budget=2)

        async def story() -> None:
            await world.ask()
            for step in (86_400, -86_400, -86_400):
                with pytest.raises(QuotaExceededError):
                    await world.quota.take("dora", 2)
                world.clock.now += step
            world.steady.now += RECHECK_S
            world.authority.budget = 10
            await world.quota.take("dora", 2)

        asyncio.run(story())

    def test_units_die_with_their_window(self) -> None:
        world = World(block=100)

        async def story() -> None:
            await world.ask()
            world.clock.now = world.authority.window_ends
            world.authority.window_ends += 60
            await world.ask()

        asyncio.run(story())
        assert len(world.authority.asked) == 2

    def test_a_block_that_came_too_late_is_not_spent(self) -> None:
        world = World()
        world.authority.window_ends = NOW
        with pytest.raises(QuotaExceededError):
            ask(world)
        assert len(world.authority.asked) == 1  # nor is the authority asked again and again

    def test_subjects_do_not_share(self) -> None:
        world = World(budget=2)

        async def story() -> None:
            await world.ask()
            await world.ask(token=MAKER.token("eli"))
            with pytest.raises(QuotaExceededError):
                await world.ask()

        asyncio.run(story())

    def test_a_crowd_takes_one_block_at_a_time_and_never_too_much(self) -> None:
        world = World(budget=40, block=10)

        async def story() -> list[Any]:
            return await asyncio.gather(*(world.ask() for _ in range(50)), return_exceptions=True)

        answers = asyncio.run(story())
        assert sum(isinstance(answer, dict) for answer in answers) == 20
        assert all(isinstance(answer, dict | QuotaExceededError) for answer in answers)
        assert world.source.most_at_once == 1

    @pytest.mark.parametrize(
        "block",
        [
            lambda: fail(UnavailableError(SECRET)),
            lambda: fail(AuthenticationError(SECRET)),
            lambda: fail(RuntimeError(SECRET)),
            lambda: Block(granted=-1, window_ends=NOW + 9),
            lambda: Block(granted=100, window_ends=float("inf")),
            lambda: Block(granted=100, window_ends=float("nan")),
        ],
    )
    def test_no_authority_means_no_answer(self, block: Callable[[], Block]) -> None:
        world = World()
        world.source.take_block = lambda _subject, _wanted: block()  # type: ignore[method-assign]  # the fault under test
        with pytest.raises(UnavailableError) as caught:
            ask(world)
        assert SECRET not in str(caught.value.args)


def test_a_pipeline_is_never_pickled() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(World().pipeline)


def test_the_metadata_names_inputs_and_outputs() -> None:
    metadata = World().pipeline.metadata()
    assert [(item["name"], item["datatype"]) for item in metadata["inputs"]] == [
        ("age", "INT64"),
        ("job", "BYTES"),
        ("hours", "FP64"),
    ]
    assert [item["name"] for item in metadata["outputs"]] == ["label", "probability"]


TENSOR = {"x": frozenset({"UINT8", "INT64", "FP32", "FP64"})}, {"x": (2, 3)}


def tensor(shape: Any, data: Any, datatype: str = "INT64") -> bytes:
    return json.dumps({"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}]}).encode()


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([2, 6], list(range(12))),
        ([2, 2, 3], list(range(12))),
        ([2, 6], [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]),
        ([2, 2, 3], [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]),
    ],
)
@pytest.mark.parametrize("datatype", ["UINT8", "INT64", "FP32"])
def test_a_tensor_column_is_read_flat_or_nested(shape: list[int], data: Any, datatype: str) -> None:
    request = tables.read_request(tensor(shape, data, datatype), *TENSOR)
    values = request.columns["x"]
    assert isinstance(values, np.ndarray)
    assert values.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert request.rows == 2


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (tensor([2], list(range(12))), "`shape` must be [N, 2, 3] or [N, 6]"),
        (tensor([2, 3, 2], list(range(12))), "`shape` must be"),
        (tensor([2, 6, 1], list(range(12))), "`shape` must be"),
        (tensor([2.0, 6], list(range(12))), "`shape` must be"),
        (tensor("2,6", list(range(12))), "`shape` must be"),
        (tensor([-1, 6], []), "12 values|-6 values"),
        (tensor([0, 6], []), "1 to 1024 rows"),
        (tensor([2, 6], list(range(11))), "says 12 values, `data` holds 11"),
        (tensor([2, 6], [[1] * 6, [1] * 5]), "not nested as `shape` says"),
        (tensor([2, 2, 3], [[[1] * 3] * 2, [[1] * 3, [1] * 2]]), "not nested as `shape` says"),
        (tensor([2, 2, 3], [[1] * 6] * 2), "not nested as `shape` says"),
        (tensor([2, 6], [[[1]] * 6] * 2), "not INT64"),
        (tensor([2, 6], [1] * 11 + [1.5]), "not INT64"),
        (tensor([2, 6], [1] * 11 + [True], "FP64"), "not FP64"),
        (tensor([2, 6], [1] * 11 + ["1"], "FP64"), "not FP64"),
        (tensor([2, 6], [1] * 11 + [None], "FP64"), "not FP64"),
        (tensor([2, 6], [1] * 11 + [256], "UINT8"), "not UINT8"),
        (tensor([2, 6], [1] * 11 + [-1], "UINT8"), "not UINT8"),
        (tensor([2, 6], [1] * 11 + [2**63]), "not INT64"),
        (tensor([2, 6], [1] * 11 + [10**400], "FP64"), "not FP64"),
        (tensor([2, 6], [1] * 12).replace(b"1]", b"1e999]").replace(b"INT64", b"FP64"), "not FP64"),
        (tensor([2, 6], [1] * 12, "INT8"), "must be sent as FP32 or FP64 or INT64 or UINT8"),
        (tensor([2, 6], [1] * 12, "BYTES"), "must be sent as"),
    ],
)
def test_a_tensor_that_breaks_the_protocol_is_refused(body: bytes, told: str) -> None:
    with pytest.raises(InputError) as refusal:
        tables.read_request(body, *TENSOR)
    assert any(part in refusal.value.message for part in told.split("|"))
