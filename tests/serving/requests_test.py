"""Requests side by side: bounded, as they come, ended by the first failure or by the reader."""

import asyncio
import time

import pytest

from montessori_jax.serving.requests import ServerLost, stream


def test_answers_come_as_they_are_done_and_all_come():
    async def answer(delay: float) -> float:
        await asyncio.sleep(delay)
        return delay

    assert list(stream([0.3, 0.0, 0.15], answer, concurrency=3)) == [0.0, 0.15, 0.3]
    assert sorted(stream(list(range(100)), asyncio_identity, concurrency=7)) == list(range(100))


async def asyncio_identity(item: int) -> int:
    await asyncio.sleep(0)
    return item


def test_a_slow_reader_is_asked_for_no_more_than_the_bound():
    begun = []

    async def answer(item: int) -> int:
        begun.append(item)
        return item

    answers = stream(list(range(50)), answer, concurrency=4)
    assert next(answers) == 0
    time.sleep(0.3)
    assert len(begun) <= 5
    assert sorted([0, *answers]) == list(range(50))


def test_never_more_at_a_time_than_the_bound():
    now, most = 0, 0

    async def answer(item: int) -> int:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return item

    assert len(list(stream(list(range(30)), answer, concurrency=6))) == 30
    assert most == 6


def test_what_was_done_before_a_failure_is_read_and_the_rest_is_cancelled():
    cancelled = []

    async def answer(item: int) -> int:
        if item == 0:
            return item
        if item == 1:
            await asyncio.sleep(0.1)
            raise ServerLost("gone")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        return item

    answers = stream([0, 1, 2, 3], answer, concurrency=4)
    assert next(answers) == 0
    with pytest.raises(ServerLost, match="gone"):
        next(answers)
    assert sorted(cancelled) == [2, 3]


def test_the_watch_ends_everything():
    async def forever(item: int) -> int:
        await asyncio.sleep(60)
        return item

    async def watch() -> None:
        await asyncio.sleep(0.05)
        raise ServerLost("no token")

    with pytest.raises(ServerLost, match="no token"):
        list(stream([1, 2], forever, concurrency=2, watch=watch))


def test_a_watch_that_sees_nothing_ends_with_the_answers():
    async def watch() -> None:
        await asyncio.sleep(60)

    began = time.monotonic()
    assert list(stream([1], asyncio_identity, concurrency=2, watch=watch)) == [1]
    assert time.monotonic() - began < 30


def test_closing_cancels_and_cleans_up():
    seen = []

    async def forever(item: int) -> int:
        try:
            await asyncio.sleep(0 if item == 0 else 60)
        finally:
            seen.append(item)
        return item

    async def clean_up() -> None:
        seen.append("clean")

    answers = stream([0, 1], forever, concurrency=2, clean_up=clean_up)
    assert next(answers) == 0
    answers.close()
    assert seen == [0, 1, "clean"]
