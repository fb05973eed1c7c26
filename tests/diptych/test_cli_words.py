import json
from pathlib import Path

import pytest

from diptych.cli import main
from diptych.testing import TINY_MODEL, tiny_recipe, tiny_sample, write_shard
from diptych.train import loop


@pytest.fixture
def run(tmp_path: Path) -> str:
    write_shard(tmp_path / "shards" / "0.tar", [tiny_sample(f"s{i}", label=i % 2) for i in range(8)])
    adapter = {"type": "context", "classes": ["fox", "cat"], "words": "a photo"}
    keys = {
        "total_samples": 8,
        "model": TINY_MODEL | {"adapters": [adapter]},
        "data": {"shards": str(tmp_path / "shards"), "lanes": 1, "workers": 0, "labels": True},
        "objective": {"contrastive": {"weight": 0.0}, "regularisers": [{"type": "classification"}]},
    }
    return str(loop.train(tiny_recipe(tmp_path / "shards", tmp_path / "run", **keys)).root)


def test_words_of_a_run(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["words", run, "--count", "2"]) == 0
    text = capsys.readouterr().out
    assert "nearest words (cosine)" in text
    assert "photo (" in text
    assert main(["words", run, "--count", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["vectors"]
    assert [(one["name"], one["place"], one["words"][0][0]) for one in found] == [
        ("context", 0, "a"),
        ("context", 1, "photo"),
    ]
    assert all(len(one["words"]) == 2 for one in found)


def test_what_cannot_be_listed_is_one_line(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["words", run, "--count", "0"]) == 2
    assert capsys.readouterr().err == "diptych: error: 0 words of a vector · count · ask for one or more\n"
