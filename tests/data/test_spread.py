"""Work spread over a cluster: every result once, errors as they were raised."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rayft.data.spread import sooner_here, spread
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


def refused(unit: int) -> Iterator[int]:
    yield unit
    if unit == 2:
        raise DataError("unit two can't be read")


@pytest.mark.parametrize(
    ("size", "processors", "here"),
    [(0, 64, True), (64, 64, True), (66, 64, False), (126, 2, True), (127, 2, False), (10**9, 1, True)],
)
def test_little_work_is_done_here_and_with_one_processor_all_of_it(size: int, processors: int, here: bool) -> None:
    assert sooner_here(size, meanwhile=63, processors=processors) is here


def test_results_come_in_the_units_order_where_asked() -> None:
    units = [3, 0, 1, 4]
    assert list(spread(units, counted, in_order=True)) == [(unit, number) for unit in units for number in range(unit)]


def test_every_result_of_each_stage_reaches_the_next_once() -> None:
    found = list(spread([3, 0, 2], counted, told))
    expected = [f"{unit}/{number}" for unit in (3, 2) for number in range(unit)]
    assert sorted(found) == sorted([*expected, *(f"{each} again" for each in expected)])


def test_results_of_one_unit_are_worked_on_by_several_processes(tmp_path: Path) -> None:
    assert len(set(spread([str(tmp_path)], in_folder, met))) > 1


def test_settings_of_an_execution_stay_its_own() -> None:
    def settings() -> tuple[object, ...]:
        context = ray.data.DataContext.get_current()
        return context.target_max_block_size, context.execution_options.preserve_order, context.enable_progress_bars

    before = settings()
    assert len(list(spread([2], counted, in_order=True))) == 2
    assert settings() == before


@pytest.mark.parametrize("stages", [1, 2])
def test_an_error_of_ours_is_raised_as_it_was(stages: int) -> None:
    with pytest.raises(DataError, match=r"^unit two can't be read$") as raised:
        list(spread([1, 2, 3], *[refused] * stages))
    assert raised.value.__cause__ is None
