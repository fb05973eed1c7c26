"""The benchmark of retrieval tells seconds and memory, also of what it does not finish."""

import mmap
import shlex
import time

import pytest
import torch

from diptych.cli import main
from diptych.errors import ConfigError
from diptych_eval import bench, metrics
from diptych_eval.bench import Row, Setting, as_json, measure, measure_all, table, unit_features


def test_features_are_unit_vectors_of_their_seed() -> None:
    features = unit_features(70_000, 4, seed=1)  # more than a chunk
    assert torch.allclose(features.norm(dim=1), torch.ones(70_000))
    assert torch.equal(features, unit_features(70_000, 4, seed=1))
    assert not torch.equal(features, unit_features(70_000, 4, seed=2))
    assert torch.equal(features.half(), unit_features(70_000, 4, seed=1, dtype=torch.float16))


def _fresh(size: int) -> mmap.mmap:
    """`size` resident bytes that no allocator had before: freed ones, as tests leave them, would not raise the peak."""
    held = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        held[page] = 1
    return held


def test_memory_is_what_ranks_take_above_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(images: torch.Tensor, texts: torch.Tensor, right: object) -> None:
        _fresh(len(images) * 2**20).close()

    monkeypatch.setattr(metrics, "ranks_both_ways", greedy)
    found = measure(Setting(128, 8, "bfloat16"), torch.get_num_threads())
    assert found.feature_bytes == 2 * 128 * 8 * 2
    assert found.extra_bytes == pytest.approx(128 * 2**20, rel=0.1)
    assert found.peak_bytes > found.extra_bytes
    assert found.seconds is not None


def test_what_takes_too_long_ends_and_tells_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def endless(images: torch.Tensor, texts: torch.Tensor, right: object) -> None:
        calls.append(len(images))
        with _fresh(64 * 2**20):
            while len(images) > 64:
                time.sleep(0.001)

    monkeypatch.setattr(metrics, "ranks_both_ways", endless)
    found = measure(Setting(65, 8, limit_seconds=0.5), torch.get_num_threads())
    assert calls == [64, 65]
    assert found.seconds is None
    assert found.extra_bytes == pytest.approx(64 * 2**20, rel=0.1)


def test_a_process_of_its_own_measures_the_real_one() -> None:
    said: list[str] = []
    (found,) = measure_all([Setting(3000, 8)], progress=said.append)
    assert said == ["3,000 x 3,000, D = 8"]
    assert found.seconds is not None
    assert found.seconds > 0
    assert 0 < found.extra_bytes < 2**30
    assert not found.problem


def test_the_table_and_what_a_million_would_take() -> None:
    rows = [
        Row(100_000, 64, "float32", 36.0, 2**30, 2**20, 2**31),
        Row(10**6, 512, "float16", None, 2**32, 2**28, 2**33),
    ]
    lines = table([*rows, Row(10**7, 512, "float32", problem="out of memory")]).splitlines()
    assert "| 100,000 | 64 | float32 | 36.0 | 1.0 | 1.00 | 1 | 2.00 |" in lines
    assert "| 1,000,000 | 512 | float16 | unfinished |  | 4.00 | 256 | 8.00 |" in lines
    assert "| 10,000,000 | 512 | float32 | out of memory | | | | |" in lines
    assert [row["hours_of_a_million"] for row in as_json(rows)] == [pytest.approx(1.0), None]


def test_other_systems_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.Path, "exists", lambda path: False)
    with pytest.raises(ConfigError, match="run it on Linux"):
        measure_all([Setting(8, 8)], progress=lambda _: None)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--rows many", "'many' are no positive numbers · --rows"),
        ("--widths 64,", "'64,' are no positive numbers · --widths"),
        ("--limit 0", "must be above 0 · bench ranks"),
    ],
)
def test_bad_input_is_one_line(arguments: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(f"bench ranks {arguments}")) == 2
    error = capsys.readouterr().err.strip()
    assert problem in error
    assert len(error.splitlines()) == 1
