"""Work spread over a cluster: every result once, errors as they were raised."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rayft.data.spread import THREADS, sooner_here, spread
from rayft.errors import DataError

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.usefixtures("ray_local")


def counted(unit: int) -> Iterator[tuple[int, int]]:
    for number in range(unit):
        yield unit, number


def told(item: tuple[int, int]) -> Iterator[str]:
    yield f"{item[0]}/{item[1]}"
    yield f"{item[0]}/{item[1]} again"


def met(item: tuple[str, int]) -> Iterator[int]:
    """This process, once another has come to work on the same unit, or after a minute."""
    folder, until = item[0], time.monotonic() + 60
    (Path(folder) / str(os.getpid())).touch()
    while len(os.listdir(folder)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    yield os.getpid()


def in_folder(folder: str) -> Iterator[tuple[str, int]]:
    for number in range(8):
        yield folder, number


def in_thread(item: int) -> Iterator[tuple[int, int]]:
    """The item and its thread, once two threads have one; None of them would come if one thread did all."""
    _both.wait(60)
    yield item, threading.get_ident()


_both = threading.Barrier(2)


def refused(unit: int) -> Iterator[int]:
    yield unit
    if unit == 2:
        raise DataError("unit two can't be read")


@pytest.mark.parametrize(
    ("size", "processors", "worth", "here"),
    [
        (0, 64, 1, True),
        (64, 64, 1, True),
        (66, 64, 1, False),
        (126, 2, 1, True),
        (127, 2, 1, False),
        (10**9, 1, 1, True),
        (10**9, 1, 1.5, True),
        (10**9, 2, 2, True),
        (378, 2, 1.5, True),
        (379, 2, 1.5, False),
    ],
)
def test_little_work_is_done_here_and_with_one_processor_all_of_it(
    size: int, processors: int, worth: float, here: bool
) -> None:
    assert sooner_here(size, 63, processors, worth) is here


def test_results_come_in_the_units_order_where_asked() -> None:
    units = [3, 0, 1, 4]
    assert list(spread(units, counted, in_order=True)) == [(unit, number) for unit in units for number in range(unit)]


def test_every_result_of_each_stage_reaches_the_next_once() -> None:
    found = list(spread([3, 0, 2], counted, told))
    expected = [f"{unit}/{number}" for unit in (3, 2) for number in range(unit)]
    assert sorted(found) == sorted([*expected, *(f"{each} again" for each in expected)])


def test_results_of_one_unit_are_worked_on_by_several_processes(tmp_path: Path) -> None:
    assert len(set(spread([str(tmp_path)], in_folder, met))) > 1


def test_what_this_process_does_comes_in_order_and_several_threads_do_it() -> None:
    found = list(spread([4, 0, 2], lambda unit: iter(range(unit)), in_thread, here=True))
    assert [item for item, _ in found] == [0, 1, 2, 3, 0, 1]
    assert threading.get_ident() not in {thread for _, thread in found}
    assert len({thread for _, thread in found}) == 2
    assert list(spread([2, 1], counted, here=True)) == [(2, 0), (2, 1), (1, 0)]


def test_this_process_takes_no_more_from_a_reader_than_its_threads_need() -> None:
    taken = []

    def reading(unit: int) -> Iterator[int]:
        for number in range(unit):
            taken.append(number)
            yield number

    results = spread([1000], reading, lambda item: iter([item]), here=True)
    assert next(results) == 0
    results.close()
    assert len(taken) <= THREADS + 1


def test_settings_of_an_execution_stay_its_own() -> None:
    def settings() -> tuple[object, ...]:
        context = ray.data.DataContext.get_current()
        return context.target_max_block_size, context.execution_options.preserve_order, context.enable_progress_bars

    before = settings()
    assert len(list(spread([2], counted, in_order=True))) == 2
    assert settings() == before


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("here", [False, True])
def test_an_error_of_ours_is_raised_as_it_was(stages: int, here: bool) -> None:
    with pytest.raises(DataError, match=r"^unit two can't be read$") as raised:
        list(spread([1, 2, 3], *[refused] * stages, here=here))
    assert raised.value.__cause__ is None
