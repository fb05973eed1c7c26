import math
import os

import pytest

from diptych.errors import DataError
from diptych_data import parallel


def test_results_come_in_order_from_any_number_of_workers() -> None:
    items = list(range(40))
    for workers in (1, 2):
        assert list(parallel.each(math.sqrt, items, title="roots", workers=workers)) == list(map(math.sqrt, items))
    assert list(parallel.each(math.sqrt, [], title="roots", workers=2)) == []


def test_what_fails_in_a_worker_fails_here() -> None:
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(parallel.each(math.sqrt, [1, -1, 1], title="roots", workers=2))


def test_a_killed_worker_is_one_line() -> None:
    with pytest.raises(DataError, match="a worker process was killed · 2 workers"):
        list(parallel.each(os._exit, [3, 3], title="dying", workers=2))
