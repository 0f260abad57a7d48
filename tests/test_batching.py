"""Requests that wait are joined, each gets its own rows, and waiting is bounded."""

import asyncio
import threading
import time

import numpy as np
import pytest

from tfhalf import batching


def rows(*values):
    return {"x": np.array(values, "float32").reshape(len(values), 1)}


class Double:
    """Doubles; notes the sizes of its batches; waits for `gate` where there is one."""

    def __init__(self):
        self.sizes, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, arrays):
        self.sizes.append(len(arrays["x"]))
        assert self.gate.wait(10)
        if np.any(arrays["x"] == 13):
            raise ValueError("unlucky")
        return {"y": arrays["x"] * 2}


def go(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def later(seconds=10.0):
    return time.monotonic() + seconds


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_idle_model_answers_at_once():
    async def body():
        batcher, double = batching.Batcher(8, 5.0, 1), Double()
        begin = time.monotonic()
        outputs, size = await batcher.run(double, rows(1, 2), 2, later())
        assert time.monotonic() - begin < 2  # it didn't wait for others
        assert outputs["y"].tolist() == [[2], [4]]
        assert size == 2

    go(body())


def test_who_waits_is_joined_and_gets_its_own_rows():
    async def body():
        batcher, double = batching.Batcher(4, 5.0, 1), Double()
        double.gate.clear()
        first = asyncio.create_task(batcher.run(double, rows(0), 1, later()))
        await until(lambda: double.sizes)
        others = [asyncio.create_task(batcher.run(double, rows(*values), len(values), later())) for values in
                  ((1,), (2, 3), (4,), (5, 6, 7, 8, 9), (10,))]  # fmt: skip
        await asyncio.sleep(0.05)
        double.gate.set()
        assert (await first)[0]["y"].tolist() == [[0]]
        answers = await asyncio.gather(*others)
        assert [outputs["y"].ravel().tolist() for outputs, _ in answers] == [
            [2], [4, 6], [8], [10, 12, 14, 16, 18], [20]]  # fmt: skip
        # Up to four rows together, one that is larger alone.
        assert double.sizes == [1, 4, 5, 1]
        assert [size for _, size in answers] == [4, 4, 4, 5, 1]

    go(body())


def test_who_has_gone_is_forgotten_at_once():
    async def body():
        batcher, double = batching.Batcher(4, 5.0, 1), Double()
        double.gate.clear()
        first = asyncio.create_task(batcher.run(double, rows(0), 1, later()))
        await until(lambda: double.sizes)
        waiting = [asyncio.create_task(batcher.run(double, rows(1), 1, later())) for _ in range(50)]
        await asyncio.sleep(0.05)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert not batcher._groups
        double.gate.set()
        await first
        assert double.sizes == [1]

    go(body())


def test_what_is_never_joined_does_not_wait_for_others():
    async def body():
        batcher, double = batching.Batcher(4, 5.0, 2), Double()
        double.gate.clear()
        tasks = [asyncio.create_task(batcher.run(double, rows(n), 1, later(), joinable=False)) for n in range(2)]
        begin = time.monotonic()
        await until(lambda: len(double.sizes) == 2)
        assert time.monotonic() - begin < 2
        double.gate.set()
        await asyncio.gather(*tasks)

    go(body())


def test_only_what_fits_together_is_joined():
    async def body():
        batcher, double = batching.Batcher(32, 5.0, 1), Double()
        double.gate.clear()
        tasks = [asyncio.create_task(batcher.run(double, rows(0), 1, later()))]
        await until(lambda: double.sizes)
        wide = {"x": np.ones([1, 3], "float32")}
        whole = {"x": np.ones([1, 1], "int32")}
        for arrays in (rows(1), wide, whole, rows(2)):
            tasks.append(asyncio.create_task(batcher.run(double, arrays, 1, later())))
        tasks += [asyncio.create_task(batcher.run(double, rows(3), 1, later(), joinable=False)) for _ in range(2)]
        await asyncio.sleep(0.05)
        double.gate.set()
        answers = await asyncio.gather(*tasks)
        assert sorted(double.sizes) == [1, 1, 1, 1, 1, 2]
        assert [outputs["y"].dtype.name for outputs, _ in answers][3] == "int32"

    go(body())


def test_waiting_is_bounded_while_a_thread_is_free():
    async def body():
        batcher, double = batching.Batcher(32, 0.05, 2), Double()
        double.gate.clear()
        stuck = asyncio.create_task(batcher.run(double, rows(0), 1, later()))
        await until(lambda: double.sizes)
        begin = time.monotonic()
        waiting = asyncio.create_task(batcher.run(double, rows(1), 1, later()))
        await until(lambda: len(double.sizes) == 2)
        assert 0.03 < time.monotonic() - begin < 2
        double.gate.set()
        await asyncio.gather(stuck, waiting)

    go(body())


def test_full_batch_does_not_wait():
    async def body():
        batcher, double = batching.Batcher(2, 60.0, 2), Double()
        double.gate.clear()
        tasks = [asyncio.create_task(batcher.run(double, rows(0), 1, later()))]
        await until(lambda: double.sizes)
        tasks += [asyncio.create_task(batcher.run(double, rows(value), 1, later())) for value in (1, 2)]
        await until(lambda: double.sizes == [1, 2])
        double.gate.set()
        await asyncio.gather(*tasks)

    go(body())


def test_bad_request_spoils_no_other():
    async def body():
        batcher, double = batching.Batcher(8, 5.0, 1), Double()
        double.gate.clear()
        tasks = [asyncio.create_task(batcher.run(double, rows(0), 1, later()))]
        await until(lambda: double.sizes)
        tasks += [asyncio.create_task(batcher.run(double, rows(value), 1, later())) for value in (1, 13, 3)]
        await asyncio.sleep(0.05)
        double.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[2], ValueError)
        assert [answers[index][0]["y"].item() for index in (1, 3)] == [2, 6]

    go(body())


def test_rows_are_counted_before_they_are_shared_out():
    def summed(arrays):
        return {"y": arrays["x"].sum(axis=0)}  # one row, however many there were

    async def body():
        batcher, gate = batching.Batcher(8, 5.0, 1), Double()
        gate.gate.clear()
        first = asyncio.create_task(batcher.run(gate, rows(0), 1, later()))
        await until(lambda: gate.sizes)
        tasks = [asyncio.create_task(batcher.run(summed, rows(value), 1, later())) for value in (1, 2)]
        await asyncio.sleep(0.05)
        gate.gate.set()
        await first
        assert [(await task)[0]["y"].tolist() for task in tasks] == [[1], [2]]

    go(body())


def test_late_and_cancelled_requests_do_not_run():
    async def body():
        batcher, double = batching.Batcher(8, 5.0, 1), Double()
        double.gate.clear()
        first = asyncio.create_task(batcher.run(double, rows(0), 1, later()))
        await until(lambda: double.sizes)
        late = asyncio.create_task(batcher.run(double, rows(1), 1, later(0.01)))
        gone = asyncio.create_task(batcher.run(double, rows(2), 1, later()))
        alive = asyncio.create_task(batcher.run(double, rows(3), 1, later()))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0.01)
        double.gate.set()
        with pytest.raises(batching.DeadlineError):
            await late
        assert (await alive)[0]["y"].item() == 6
        await first
        assert double.sizes == [1, 1]

    go(body())
