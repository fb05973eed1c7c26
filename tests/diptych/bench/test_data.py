"""The benchmark of the loader measures what it says, on data that takes no time to make."""

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from diptych.bench.data import MEASURES, Plan, Report, Row, as_json, measure_all, table
from diptych.bench.data_ours import _decoders, _deep, _floor, _loader, _tokenizer, _webdataset, floor_shrink
from diptych.bench.data_peer import Request, captions_per_second, images_per_second, worker_memory
from diptych.bench.data_pictures import caption, parse_sizes, pattern, photo, write_captions, write_many, write_photos
from diptych.cli import main
from diptych.data import jpeg
from diptych.data.loader import Loader
from diptych.data.shards import list_shards, read_shard
from diptych.errors import ConfigError

TINY = Plan(sizes=((40, 32),), measures=("throughput", "resume"), rounds=1, batch=4, batches=2, side=16, shards=64)


@pytest.fixture
def request_for_photos(tmp_path: Path) -> Request:
    write_photos(tmp_path, (40, 32), 12, shards=2)
    return Request("throughput", "ours", pattern(tmp_path, 2), side=16, batch=4, batches=2, core=0)


@pytest.mark.slow
def test_each_round_asks_everybody_and_the_table_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    plan = dataclasses.replace(TINY, samples_per_shard=8)
    report = measure_all(plan, progress=said.append, work=tmp_path)
    assert not [row.problem for row in report.rows if row.problem]
    assert {row.implementation for row in report.rows} == {"floor", "ours", "webdataset"}
    assert all(row.spread[0] <= row.value <= row.spread[1] for row in report.rows)
    assert all(row.value > 0 for row in report.rows)
    assert report.versions["ours"].keys() >= {"torch", "simplejpeg"}
    assert 0 < report.bytes_per_pixel["40×32"] < 5
    assert "| images/s | 40×32 | floor |" in table(report)
    assert json.loads(json.dumps(as_json(report)))["rows"][0]["title"] == "images/s"
    assert not list(tmp_path.iterdir())
    assert any("resume" in text for text in said)


def test_ratios_are_to_the_peer_and_to_the_floor_of_the_same_data() -> None:
    rows = (
        Row("images/s", "500×375", "floor", 2000.0, (1900.0, 2100.0)),
        Row("images/s", "500×375", "ours", 1000.0, (900.0, 1100.0)),
        Row("images/s", "500×375", "open_clip", 250.0, (240.0, 260.0)),
        Row("images/s", "1024×768", "ours", 400.0, (400.0, 400.0)),
        Row("captions/s", "x", "open_clip", 0.0, problem="No module named 'pandas'"),
    )
    versions = {"floor": {"torch": "2.13.0"}, "ours": {"torch": "2.13.0"}, "open_clip": {"torch": "2.12.0"}}
    lines = table(Report(rows, versions, {"500×375": 0.2})).splitlines()
    assert "floor, ours: torch 2.13.0; open_clip: torch 2.12.0" in lines[0]
    assert "500×375 0.20" in lines[0]
    assert "| images/s | 500×375 | ours | 1,000 (900, 1,100) | 4.00 | 50% |" in lines
    assert "| images/s | 1024×768 | ours | 400 (400, 400) |  |  |" in lines
    assert "| captions/s | x | open_clip | No module named 'pandas' | | |" in lines


def test_what_fails_in_a_process_is_a_row_not_a_crash(tmp_path: Path) -> None:
    plan = dataclasses.replace(TINY, measures=("tokens",), peer_python=_python_without_packages(tmp_path))
    found = {row.implementation: row.problem for row in measure_all(plan, progress=lambda _: None).rows}
    assert found["ours"] == ""
    assert "torch" in found["open_clip"]


def _python_without_packages(folder: Path) -> Path:
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python{sys.version_info[0]} -S "$@"\n')
    python.chmod(0o755)
    return python


def test_the_first_batch_is_not_timed_and_pictures_are_counted() -> None:
    taken: list[int] = []

    def sizes() -> Any:
        for size in (1000, 3, 4, 5):
            taken.append(size)
            yield size

    answer = images_per_second(sizes(), 2)
    assert taken == [1000, 3, 4]
    assert answer.keys() == {"images_per_second"}


def test_the_floor_decodes_at_the_scale_that_crops_need(request_for_photos: Request) -> None:
    header = jpeg.Header(1024, 768, 1)
    assert [floor_shrink(header, side) for side in (400, 224, 100)] == [1, 2, 4]  # nine tenths of 768 are 691
    assert next(_floor(request_for_photos)) == 4


# webdataset leaves it to the collector to close its shards.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_gives_whole_batches_without_end(request_for_photos: Request) -> None:
    batches = _webdataset(request_for_photos)
    assert [next(batches) for _ in range(4)] == [4, 4, 4, 4]  # there are three of them
    del batches
    gc.collect()


def test_ours_gives_whole_batches(request_for_photos: Request) -> None:
    with _loader(request_for_photos, _tokenizer(), lanes=2).batches() as batches:
        assert next(batches).images.shape == (4, 3, 16, 16)


def test_every_way_to_decode_is_timed(request_for_photos: Request) -> None:
    found = _decoders(request_for_photos)
    assert {f"simplejpeg at {n}/8" for n in range(1, 9)} < set(found)
    assert all(value > 0 for value in found.values())


def test_a_worker_has_memory() -> None:
    assert worker_memory(iter([1, 2, 3]), 2) == {"pss_mib": 0.0, "uss_mib": 0.0}  # no worker, none


def test_captions_are_all_different_and_all_tokenised_but_the_first_batch(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions.txt", 10)
    seen: list[list[str]] = []
    request = Request("tokens", "ours", str(tmp_path / "captions.txt"), side=16, batch=4, batches=1, core=0)
    captions_per_second(seen.append, request)
    assert [len(batch) for batch in seen] == [4, 4, 2]
    assert len({text for batch in seen for text in batch}) == 10
    assert 8 <= len(caption(3).split()) <= 16


def test_resuming_begins_deep_in_an_epoch(tmp_path: Path) -> None:
    write_many(tmp_path, 64, 10)
    request = Request("resume", "ours", pattern(tmp_path, 64), side=16, batch=4, batches=1, core=0)
    loader: Loader = _loader(request, _tokenizer(), lanes=64)
    cursors = _deep(loader)
    assert {cursor.position for cursor in cursors.lanes.values()} == {8}
    assert cursors.slot == 64 * 8


def test_pictures_cost_what_photographs_cost() -> None:
    picture = photo(500, 375, seed=3)
    assert picture.size == (500, 375)
    assert picture.tobytes() == photo(500, 375, seed=3).tobytes()
    assert picture.tobytes() != photo(500, 375, seed=4).tobytes()


def test_shards_of_photos_are_jpeg_with_captions(tmp_path: Path) -> None:
    density = write_photos(tmp_path, (200, 150), 6, shards=2)
    assert 0.1 < density < 0.5
    samples = [sample for shard in list_shards(pattern(tmp_path, 2)) for sample in read_shard(shard)]
    assert len({sample.key for sample in samples}) == 6
    assert all(jpeg.read_header(sample.members["jpg"]) == jpeg.Header(200, 150, 1) for sample in samples)
    assert all(sample.members["txt"] for sample in samples)


@pytest.mark.parametrize("text", ["", "500", "500x", "500x375,", "8x8", "9000x9000", "-20x20", "500*375"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"are no sizes of pictures · bench data --sizes"):
        parse_sizes(text)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--peer-python", "nowhere/python"], "there is no Python at 'nowhere/python' · bench data --peer-python"),
        (["--sizes", "large"], "'large' are no sizes of pictures"),
        (["--measures", "speed"], "unknown measure 'speed' · bench data --measures"),
        (["--rounds", "0"], "must be at least 1"),
        (["--measures", "tokens", "--work", "nowhere/at/all"], "the data cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert problem in error
    assert len(error.splitlines()) == 1


def test_everybody_is_measured_by_somebody() -> None:
    """The peer's file runs alone: it must not import diptych."""
    source = Path(sys.modules[Request.__module__].__file__ or "").read_text(encoding="utf-8")
    assert "import diptych" not in source
    assert "from diptych" not in source
    assert all("ours" in names for names in MEASURES.values())
