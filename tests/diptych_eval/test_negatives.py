"""Composition on what `diptych data negatives` wrote: each text an example of its kind."""

import json
from pathlib import Path

import pytest
from tests.diptych_eval.fakes import ColourEncoder

import diptych.testing as make
from diptych.errors import DataError
from diptych.testing import TinySample, tiny_sample
from diptych_eval.embedder import Embedder
from diptych_eval.tasks.composition import Composition


def sample(key: str, negatives: object) -> TinySample:
    made = tiny_sample(key)
    document = json.loads(made.members["json"]) | {"negatives": negatives}
    return TinySample(key, made.members | {"json": json.dumps(document).encode()})


def negative(text: str, of: str, how: str = "replace", kind: str = "object") -> dict[str, str]:
    return {"text": text, "of": of, "how": how, "type": kind}


def test_each_negative_is_an_example_of_its_kind(tmp_path: Path) -> None:
    wrong = [negative("a b", "caption of a"), negative("caption of a", "a b", "swap", "colour")]
    samples = [sample("a", wrong), sample("b", [negative("a c", "b")]), sample("c", ["no record", {"text": 1}])]
    make.write_shard(tmp_path / "0.tar", samples)
    found = Composition("x", str(tmp_path), each="negative").run(Embedder(ColourEncoder()))
    # Of a: true before "a b" (another colour), false the other way round; of b: true.
    assert found.metrics == {
        "accuracy": pytest.approx(2 / 3),
        "accuracy/replace object": 1.0,
        "accuracy/swap colour": 0.0,
        "accuracy/mean_of_groups": 0.5,
    }
    assert found.items[0].keys == ("a: a b", "a: caption of a", "b: a c")
    assert found.items[0].clusters == ("a", "a", "b")


def test_the_blind_test_stands_beside(tmp_path: Path) -> None:
    make.write_shard(tmp_path / "0.tar", [sample("a", [negative("a b", "caption of a")])])
    (tmp_path / "blind.json").write_text(json.dumps({"kinds": {"replace object": {"value": 0.51}}}))
    task = Composition("x", str(tmp_path), each="negative", blind=tmp_path / "blind.json")
    assert task.run(Embedder(ColourEncoder())).metrics["blind/replace object"] == 0.51
    (tmp_path / "blind.json").write_text("[]")
    with pytest.raises(DataError, match="not what `diptych data blind --json` prints"):
        task.run(Embedder(ColourEncoder()))


def test_shards_without_negatives_are_told(tmp_path: Path) -> None:
    make.write_shard(tmp_path / "0.tar", [tiny_sample("a")])
    with pytest.raises(DataError, match=r"no sample has negatives · .* · diptych data negatives writes them"):
        Composition("x", str(tmp_path), each="negative").run(Embedder(ColourEncoder()))
