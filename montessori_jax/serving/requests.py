"""Many requests at once to one server: bounded, retried, and given up on for a stated reason.

The requests run in an event loop on a thread of its own, so that whoever reads the answers, writes
them to disk and draws a bar is plain code.
"""

import asyncio
import contextlib
import queue
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from montessori_jax.errors import UserError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

# Answers that mean "later": timeouts, too many requests, and the server's own faults.
LATER = frozenset([408, 409, 425, 429, 500, 502, 503, 504, 529])
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0


class ServerLost(Exception):
    """The server does not answer any more; what it was asked can be asked again elsewhere."""


class Refused(UserError):
    """The server refuses a request as such, with this HTTP status."""

    def __init__(self, message: str, http_status: int):
        super().__init__(message)
        self.http_status = http_status


class Garbled(ValueError):
    """An answer that is none: no JSON, a missing field, too few choices."""


@dataclass(frozen=True)
class Patience:
    """How often and how long a request is tried.

    Attributes:
        retries: attempts after the first.
        seconds: longest wait for one answer.
    """

    retries: int
    seconds: float


def bearer(key: str) -> dict[str, str]:
    """The header that a key goes into; none for ""."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def open_client(url: str, key: str) -> httpx.AsyncClient:
    """A client that bounds nothing by itself: `stream` does."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, headers=bearer(key), limits=limits)


async def ask(
    client: httpx.AsyncClient,
    path: str,
    body: dict[str, Any],
    read: Callable[[Any], Answer],
    patience: Patience,
) -> Answer:
    """POST ``body`` and ``read`` the JSON that comes back.

    Lost connections, time-outs, statuses that mean "later" and answers that ``read`` refuses
    (`Garbled`) are tried again after a wait that doubles up to half a minute, or as long as the
    server's ``Retry-After`` asks for.

    Raises:
        Refused: the server refuses the request as such (any other status).
        ServerLost: it was tried ``patience.retries`` times more, in vain.
    """
    for attempt in range(patience.retries + 1):
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
        try:
            response = await client.post(path, json=body, timeout=patience.seconds)
            if response.status_code in LATER:
                problem = f"{response.status_code} {error_text(response)}"
                wait = max(wait, _retry_after(response))
            elif response.is_error:
                raise Refused(
                    f"{client.base_url} refused the request with {response.status_code}: "
                    f"{error_text(response)}",
                    response.status_code,
                )
            else:
                return read(response.json())
        except httpx.TimeoutException:
            problem = f"no answer within {patience.seconds:.0f} s"
        except httpx.RequestError as error:
            problem = f"{type(error).__name__} {error}".strip()
        except Garbled as error:
            problem = f"an answer that cannot be used ({error})"
        except ValueError:
            problem = f"an answer that is no JSON ({response.text[:80]!r})"
        if attempt < patience.retries:
            await asyncio.sleep(wait)
    raise ServerLost(f"after {patience.retries + 1} attempts: {problem}")


def error_text(response: httpx.Response) -> str:
    """What the server says is wrong, in one line."""
    try:
        values = response.json()
        found = values.get("error", values)
        text = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:300] or response.reason_phrase


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(120.0, float(response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0  # a date, which no such server sends


def stream(
    items: Sequence[Item],
    answer: Callable[[Item], Awaitable[Answer]],
    *,
    concurrency: int,
    watch: Callable[[], Coroutine[Any, Any, None]] | None = None,
    clean_up: Callable[[], Awaitable[None]] | None = None,
) -> Generator[Answer, None, None]:
    """Answers to ``items`` as they come, at most ``concurrency`` asked for or unread at a time.

    Whoever reads slowly is asked for less: an answer holds its place until it is read. Closing the
    iterator cancels what is under way.

    Args:
        items: asked in this order.
        answer: makes one answer.
        concurrency: most items under way.
        watch: runs beside them until they are done; what it raises ends everything.
        clean_up: runs last, in the same loop.

    Raises:
        Exception: the first of what ``answer`` or ``watch`` raised, once the answers that were
            finished before it have been read.
    """
    finished: queue.Queue[tuple[str, Any]] = queue.Queue()
    loop = asyncio.new_event_loop()
    places = asyncio.Semaphore(concurrency)

    async def one(item: Item) -> None:
        try:
            finished.put(("answer", await answer(item)))
        except BaseException:
            places.release()
            raise

    async def everything() -> None:
        async with asyncio.TaskGroup() as beside:
            watching = beside.create_task(watch()) if watch is not None else None
            async with asyncio.TaskGroup() as group:
                for item in items:
                    await places.acquire()
                    group.create_task(one(item))
            if watching is not None:
                watching.cancel()

    async def main() -> None:
        try:
            await everything()
        except BaseExceptionGroup as failures:
            finished.put(("error", _first(failures)))

    running = loop.create_task(main())

    def run() -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(running)
            if clean_up is not None:
                loop.run_until_complete(clean_up())
        finally:
            loop.close()
            finished.put(("end", None))

    def tell(callback: Callable[[], Any]) -> None:
        # The loop is closed once its last answer waits to be read.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(callback)

    thread = threading.Thread(target=run, name="requests", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = finished.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            tell(places.release)
            yield value
    finally:
        tell(running.cancel)
        thread.join()


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure that is not itself a group."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
