"""The benchmark of the loss measures what it says, on sizes that take no time."""

import pytest

from diptych.bench.loss import Row, Setting, implementations, measure_all, table
from diptych.errors import ConfigError


def test_every_implementation_finds_the_same_loss() -> None:
    setting = Setting("ours", 0, 32, "cpu", "float32")
    names = [name for name in implementations() if not name.endswith(("compiled", "plugs"))]
    rows = measure_all(setting, [600], names, rounds=1, progress=lambda text: None)
    by_name = {row.implementation: row for row in rows}
    assert not any(row.problem for row in rows)
    for left, right in (("ours", "open_clip"), ("ours", "chunked"), ("ours-sigmoid", "open_clip-sigmoid")):
        assert by_name[left].loss == pytest.approx(by_name[right].loss, abs=1e-4)
    assert all(row.seconds > 0 and row.floor_seconds > 0 for row in rows)
    assert by_name["open_clip"].extra_bytes > 600 * 600 * 4


def test_what_could_not_be_measured_is_said() -> None:
    setting = Setting("ours", 0, 32, "cpu", "float32")
    rows = [Row("ours", 8, 1.0, (1.0, 1.0), 1, 0.5, 2.0), Row("open_clip", 8, 0, (0, 0), 0, 0.5, 0, "out of memory")]
    text = table(rows, setting, peer="open_clip")
    assert "| 8 | open_clip | out of memory |" in text
    assert "| 8 | ours | 1.00 (1.00, 1.00) | – |" in text
    with pytest.raises(ConfigError, match="unknown implementation"):
        measure_all(setting, [8], ["nobody"], rounds=1, progress=lambda text: None)
