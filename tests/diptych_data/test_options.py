import pytest

from diptych.config import Config, describe
from diptych_data.check import CheckOptions
from diptych_data.dedup import DedupOptions
from diptych_data.filter import FilterOptions
from diptych_data.stats import StatsOptions
from diptych_data.subset import MergeOptions, SubsetOptions
from diptych_data.view import ViewOptions


@pytest.mark.parametrize(
    "options", [StatsOptions, CheckOptions, ViewOptions, SubsetOptions, MergeOptions, FilterOptions, DedupOptions]
)
def test_every_field_of_a_tool_has_a_docstring(options: type[Config]) -> None:
    assert [entry.key for entry in describe(options) if not entry.doc] == []
