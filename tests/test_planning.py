"""The arithmetic of large jobs, against hand-computed numbers."""

import math
import random

import pytest
from simulate_job import simulate

from sdipc_jax.batch.planning import Stage, duration, plan
from sdipc_jax.errors import InputError

STAGES = [Stage("read", 0.01, 2), Stage("sample", 1.0, 16), Stage("encode", 0.1, 4)]


def test_the_slowest_stage_decides() -> None:
    found = plan(64_000, STAGES, bytes_per_picture=1000, shard_size=500, startup_seconds=100, price_per_hour=18)
    assert (found.slowest, found.pictures_per_second) == ("sample", 16)
    assert found.busy == {"read": 0.08, "sample": 1, "encode": 0.4}
    assert found.seconds == 4100
    assert found.cost == pytest.approx(20.5)
    assert (found.bytes, found.shards, found.seconds_per_shard) == (64_000_000, 128, 31.25)
    faster = [Stage("sample", 1.0, 400), *STAGES[::2]]
    assert plan(64_000, faster, bytes_per_picture=1, shard_size=500).slowest == "encode"


@pytest.mark.parametrize(
    "pictures, hosts, seconds",
    [
        (4000, 1, 250),
        # 8 shards on 4 hosts: 2 each, at a quarter of the pace.
        (4000, 4, 250),
        # 9 and 10 shards: some have 3, and the others wait; a last shard of 100 is alone in the third round.
        (4500, 4, 375),
        (4100, 4, 1100 / 4),
        (4600, 4, 375),
        # One shard: the other hosts have none.
        (100, 4, 25),
    ],
)
def test_hosts_take_whole_shards(pictures: int, hosts: int, seconds: float) -> None:
    assert plan(pictures, STAGES, bytes_per_picture=1, shard_size=500, hosts=hosts).seconds == seconds


def test_a_plan_in_words() -> None:
    # The busiest host has 157 shards: 157 x 10,000 x 64 x 1.05 / 256 = 412,125 s.
    found = plan(100_000_000, [Stage("sample", 1.05, 256)], bytes_per_picture=460e3, shard_size=10_000, hosts=64,
                 price_per_hour=100)  # fmt: skip
    assert str(found).splitlines() == [
        "100,000,000 pictures in 4 d 18 h (243.8 a second), 46 TB in 10,000 shards of 43 min 45 s each, cost 11,447.92",
        "sample is the slowest; busy: sample 100%",
    ]
    assert found.to_json()["shards"] == 10_000


@pytest.mark.parametrize(
    "seconds, text",
    [(0.5, "0.5 s"), (60, "1 min"), (89.6, "1 min 30 s"), (3600, "1 h"), (86399, "24 h"), (90_000, "1 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "stage, changes, message",
    [
        (Stage("sample", 0.0, 1), {}, "sample.seconds is 0.0, expected a positive number"),
        (Stage("sample", 1.0, 0), {}, "sample.workers is 0, expected"),
        (Stage("sample", float("nan"), 1), {}, "sample.seconds is nan, expected"),
        (Stage("sample", 1.0, 1), {"shard_size": 0}, "shard_size is 0, expected"),
        (Stage("sample", 1.0, 1), {"hosts": -1}, "hosts is -1, expected"),
        (Stage("sample", 1.0, 1), {"bytes_per_picture": float("inf")}, "bytes_per_picture is inf, expected"),
    ],
)
def test_numbers_that_make_no_sense(stage: Stage, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(10, [stage], **{"bytes_per_picture": 1, "shard_size": 5} | changes)


def test_no_stages() -> None:
    with pytest.raises(InputError, match="there are no stages"):
        plan(10, [], bytes_per_picture=1, shard_size=5)


class Lives(random.Random):
    """How long hosts stay, one after the other; for ever after the last."""

    def __init__(self, *lives: float) -> None:
        super().__init__()
        self.lives = [*lives]

    def expovariate(self, lambd: float = 1.0) -> float:
        return self.lives.pop(0) if self.lives else math.inf


@pytest.mark.parametrize(
    "pictures, hosts, shared, lives, seconds",
    [
        # Shards of 2, 4 and 4 pictures: 2 from second 5 to 8 and 4 until 13; 4 until 10.
        (10, 2, True, [], 13),
        (10, 2, False, [], 13),
        # 2 and 4 of two hosts' own until 13, and 4 and 4 until 15.
        (14, 2, False, [], 15),
        (14, 2, True, [], 15),
        # Taken away at 7 and back at 17, ready at 22; the shard begins anew.
        (4, 1, True, [7], 27),
        # Taken away while it got ready, at 3, back at 13 and gone at 13 + 4, back at 27.
        (4, 1, True, [3, 4], 37),
        # The other takes over what the first had begun, or has to wait for it.
        (8, 2, True, [7], 15),
        (8, 2, False, [7], 27),
    ],
)
def test_the_simulation_does_what_is_worked_out_by_hand(
    pictures: int, hosts: int, shared: bool, lives: list[float], seconds: float
) -> None:
    options = {"seconds": 1, "life": 3600, "back": 10, "start": 5, "finish": 1}
    found = simulate(pictures, 4, hosts=hosts, shared=shared, luck=Lives(*lives), **options)
    assert found == seconds
