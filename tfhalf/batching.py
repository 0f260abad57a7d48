"""Joins requests into batches while a model is busy, and answers each with its own rows.

A request whose model is idle runs at once, alone. While its model runs, it waits for others of the same function whose
arrays agree in dtype and in all axes but the first; they run together when the model is idle again, when `max_rows` are
together, or when the first has waited for `timeout` seconds and a thread is free. So waiting is bounded, and batches
grow with the load by themselves. Where a joined batch fails, each request runs again alone: one bad request doesn't
spoil the others' answers.

TensorFlow runs in threads. All else happens in one event loop.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Arrays = Mapping[str, np.ndarray]
Function = Callable[[Arrays], dict[str, np.ndarray]]


class DeadlineError(Exception):
    """A request's time was over before it could run."""


@dataclasses.dataclass(eq=False)
class _Item:
    arrays: Arrays
    rows: int
    deadline: float
    since: float
    future: asyncio.Future


class Batcher:
    """Runs functions of arrays in threads, and joins requests while they wait.

    Args:
        max_rows: most rows of a joined batch, 1 or more; a request that has more by itself runs alone.
        timeout: longest time in seconds that a request waits for others while a thread is free, 0 or more.
        threads: how many batches run at a time, 1 or more.
    """

    def __init__(self, max_rows: int, timeout: float, threads: int) -> None:
        self._max_rows, self._timeout, self._free = max_rows, timeout, threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="batch")
        self._groups: dict[Hashable, list[_Item]] = {}
        self._functions: dict[Hashable, Function] = {}
        self._running: dict[Function, int] = {}
        self._tasks: set[asyncio.Task] = set()

    async def run(
        self, function: Function, arrays: Arrays, rows: int, deadline: float, joinable: bool = True
    ) -> tuple[dict[str, np.ndarray], int]:
        """Runs a function on arrays, perhaps together with other requests.

        Args:
            function: from arrays by name to arrays by name; where `joinable`, rows in, the same rows out.
            arrays: its inputs.
            rows: length of their first axis.
            deadline: a time of `time.monotonic` after which nobody waits for the answer.
            joinable: whether rows of several requests may be joined.

        Returns:
            The outputs, and how many rows ran together.

        Raises:
            DeadlineError: the deadline passed while the request waited.
        """
        loop = asyncio.get_running_loop()
        item = _Item(arrays, rows, deadline, time.monotonic(), loop.create_future())
        key: Hashable = item
        if joinable:
            shapes = sorted((name, array.dtype.str, array.shape[1:]) for name, array in arrays.items())
            key = (function, tuple(shapes))
        self._groups.setdefault(key, []).append(item)
        self._functions[key] = function
        self._start_what_is_ready()
        if not item.future.done():
            loop.call_later(self._timeout, self._start_what_is_ready)
        try:
            return await item.future
        finally:
            if item in self._groups.get(key, ()):  # who asked has gone before it began
                self._groups[key].remove(item)
                if not self._groups[key]:
                    del self._groups[key], self._functions[key]

    def _start_what_is_ready(self) -> None:
        while self._free:
            ready = [key for key in self._groups if self._is_ready(key)]
            if not ready:
                return
            self._start(min(ready, key=lambda key: self._groups[key][0].since))

    def _is_ready(self, key: Hashable) -> bool:
        group = self._groups[key]
        waited = time.monotonic() - group[0].since
        is_idle = not self._running.get(self._functions[key])
        # A clock's tick less than the timeout, or the timer that is set for it could come too early and be the last.
        is_late = waited >= self._timeout - 1e-3
        return is_idle or is_late or isinstance(key, _Item) or sum(item.rows for item in group) >= self._max_rows

    def _start(self, key: Hashable) -> None:
        group, batch, rows = self._groups[key], [], 0
        while group and (not batch or rows + group[0].rows <= self._max_rows):
            rows += group[0].rows
            batch.append(group.pop(0))
        function = self._functions[key]
        if not group:
            del self._groups[key], self._functions[key]
        self._free -= 1
        self._running[function] = self._running.get(function, 0) + 1
        task = asyncio.get_running_loop().create_task(self._run_batch(function, batch))
        self._tasks.add(task)  # the loop itself keeps weak references only
        task.add_done_callback(self._tasks.discard)

    async def _run_batch(self, function: Function, batch: list[_Item]) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._threads, _compute, function, batch)
        finally:
            self._free += 1
            self._running[function] -= 1
            if not self._running[function]:
                del self._running[function]
            self._start_what_is_ready()
        for item, (answer, rows) in zip(batch, answers, strict=True):
            if item.future.done():  # who asked has gone
                continue
            if isinstance(answer, Exception):
                item.future.set_exception(answer)
            else:
                item.future.set_result((answer, rows))


def _compute(function: Function, batch: list[_Item]) -> list[tuple[dict[str, np.ndarray] | Exception, int]]:
    """Answers or errors in the batch's order, and how many rows ran together; in a thread."""
    now = time.monotonic()
    alive = [item for item in batch if now < item.deadline and not item.future.done()]
    answers: dict[int, tuple[dict[str, np.ndarray] | Exception, int]] = {}
    if len(alive) > 1:
        rows = sum(item.rows for item in alive)
        try:
            outputs = function(
                {name: np.concatenate([item.arrays[name] for item in alive]) for name in alive[0].arrays}
            )
            if all(len(array) == rows for array in outputs.values()):
                start = 0
                for item in alive:
                    mine = {name: array[start : start + item.rows] for name, array in outputs.items()}
                    answers[id(item)] = mine, rows
                    start += item.rows
        except Exception:  # one of them may be to blame: each gets its own answer below
            answers.clear()
    for item in alive:
        if id(item) not in answers:
            answers[id(item)] = _alone(function, item), item.rows
    late = DeadlineError("the deadline passed before the model was free")
    return [answers.get(id(item), (late, item.rows)) for item in batch]


def _alone(function: Function, item: _Item) -> dict[str, np.ndarray] | Exception:
    try:
        return function(item.arrays)
    except Exception as error:  # it is raised where the request waits
        return error
