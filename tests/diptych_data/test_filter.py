import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import diptych.testing as make
from diptych.cli import main
from diptych.config import from_tree
from diptych.data.images import EvaluationView
from diptych.data.shards import list_shards, read_shard
from diptych.errors import ConfigError, DataError
from diptych.export.to_open_clip import export
from diptych.models import dual_encoder
from diptych.testing import TinySample, tiny_sample
from diptych_data import nearest
from diptych_data.filter import FilterOptions, FilterSummary, filter_shards


class Colours:
    """A model that knows the mean colour of a picture, and of a caption the three numbers in it."""

    image_size = 8
    view = EvaluationView(8)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit-norm mean RGB."""
        return torch.nn.functional.normalize(images.float().mean((2, 3)), dim=1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm numbers."""
        return torch.nn.functional.normalize(torch.tensor([[float(word) for word in t.split()] for t in texts]), dim=1)


def load(_: str) -> Colours:
    return Colours()


def coloured(key: str, colour: tuple[int, int, int], caption: str | None = None) -> TinySample:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    text = caption if caption is not None else " ".join(map(str, colour))
    return TinySample(key, {"png": buffer.getvalue(), "txt": text.encode()})


def sized(key: str, width: int, height: int, caption: str) -> TinySample:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "navy").save(buffer, "PNG")
    return TinySample(key, {"png": buffer.getvalue(), "txt": caption.encode()})


def run(folder: Path, out: Path, **settings: object) -> FilterSummary:
    tree = {"shards": str(folder), "out": str(out), "workers": 1} | settings
    return filter_shards(from_tree(FilterOptions, tree), load=load)


def keys(folder: Path) -> list[str]:
    return [sample.key for shard in list_shards(str(folder)) for sample in read_shard(shard)]


def scores(out: Path) -> dict[str, dict[str, str]]:
    with (out / "scores.csv").open(encoding="utf-8", newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


SIZES = [
    sized("fine", 64, 64, "a red bus"),
    sized("small", 64, 31, "a red bus"),
    sized("long", 400, 40, "a red bus"),
    sized("huge", 1100, 1000, "a red bus"),
    sized("terse", 64, 64, "bus"),
    sized("wordy", 64, 64, "b " * 30),
    sized("chatty", 64, 64, "b" * 99),
    TinySample("html", {"jpg": b"<!doctype html>", "txt": b"a red bus"}),
    TinySample("mute", {"png": tiny_sample("x").members["png"]}),
]


@pytest.mark.parametrize(
    ("rule", "goes"),
    [
        ({"min_side": 32}, {"small": "min_side"}),
        ({"max_aspect": 3}, {"long": "max_aspect"}),
        ({"max_megapixels": 1}, {"huge": "max_megapixels"}),
        ({"min_chars": 4}, {"terse": "min_chars"}),
        ({"max_chars": 60}, {"chatty": "max_chars"}),
        ({"min_words": 2}, {"terse": "min_words", "chatty": "min_words"}),
        ({"max_words": 20}, {"wordy": "max_words"}),
        ({"min_side": 32, "min_words": 2, "max_aspect": 9}, {"small": "min_side", "long": "max_aspect"}),
    ],
)
def test_rules(tmp_path: Path, rule: dict[str, float], goes: dict[str, str]) -> None:
    make.write_shard(tmp_path / "in" / "0.tar", SIZES)
    goes = goes | {"html": "undecodable", "mute": "no_caption"}
    if len(rule) == 3:
        goes |= {"terse": "min_words", "chatty": "min_words"}
    summary = run(tmp_path / "in", tmp_path / "out", **rule)
    assert keys(tmp_path / "out") == [sample.key for sample in SIZES if sample.key not in goes]
    table = scores(tmp_path / "out")
    assert {key: row["dropped_by"] for key, row in table.items() if row["kept"] == "0"} == goes
    assert summary.samples == len(SIZES) == summary.kept + sum(summary.dropped.values())
    assert json.loads((tmp_path / "out" / "filter.json").read_text())["summary"]["kept"] == summary.kept


def test_the_caption_may_come_from_a_column(tmp_path: Path) -> None:
    rows = [
        TinySample("a", {"png": SIZES[0].members["png"], "json": b'{"captions": {"long": ["one two three"]}}'}),
        TinySample("b", {"png": SIZES[0].members["png"], "json": b'{"captions": {"other": ["one two three"]}}'}),
    ]
    make.write_shard(tmp_path / "in" / "0.tar", rows)
    summary = run(tmp_path / "in", tmp_path / "out", column="long", min_words=3)
    assert keys(tmp_path / "out") == ["a"]
    assert summary.dropped == {"no_caption": 1}


# --- a model's judgement -------------------------------------------------------------------------------------------


def test_clip_score(tmp_path: Path) -> None:
    rows = [
        coloured("right", (200, 10, 10)),
        coloured("nearly", (200, 10, 10), "200 80 10"),
        coloured("wrong", (200, 10, 10), "10 10 200"),
        coloured("tiny", (1, 2, 3), "1"),
    ]
    make.write_shard(tmp_path / "in" / "0.tar", rows)
    summary = run(tmp_path / "in", tmp_path / "out", model="colours", min_score=0.9, min_chars=3)
    assert keys(tmp_path / "out") == ["right", "nearly"]
    assert summary.dropped == {"score": 1, "min_chars": 1}
    table = scores(tmp_path / "out")
    cosine = (200 * 200 + 10 * 80 + 10 * 10) / np.sqrt((200**2 + 2 * 10**2) * (200**2 + 80**2 + 10**2))
    assert float(table["nearly"]["score"]) == pytest.approx(cosine, abs=1e-6)  # printed with six digits
    assert table["tiny"]["score"] == ""  # the model is not asked about what has gone already
    assert run(tmp_path / "in", tmp_path / "half", model="colours", keep_fraction=0.5, min_chars=3).kept == 2
    assert keys(tmp_path / "half") == ["right", "nearly"]


def test_credibility_finds_swapped_captions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        base = np.array([200, 20, 20]) if number % 2 else np.array([20, 20, 200])
        colour = tuple(int(value) for value in base + rng.integers(0, 20, 3))
        rows.append(coloured(f"{number:02d}", (colour[0], colour[1], colour[2])))
    red, blue = rows[7].members["txt"], rows[8].members["txt"]
    rows[7].members["txt"], rows[8].members["txt"] = blue, red
    make.write_shard(tmp_path / "in" / "0.tar", rows)
    summary = run(tmp_path / "in", tmp_path / "out", model="m", credibility={"k": 5, "keep_fraction": 0.95})
    assert summary.dropped == {"credibility": 2}
    assert set(keys(tmp_path / "out")) == {row.key for row in rows} - {"07", "08"}
    measured = run(tmp_path / "in", tmp_path / "all", model="m", credibility={})
    assert measured.kept == 40
    values = {key: float(row["credibility"]) for key, row in scores(tmp_path / "all").items()}
    assert max(values["07"], values["08"]) < min(v for k, v in values.items() if k not in ("07", "08"))
    with pytest.raises(DataError, match="too few for 40 neighbours"):
        run(tmp_path / "in", tmp_path / "no", model="m", credibility={"k": 40})
    assert not (tmp_path / "no").exists()


def unit(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)


def dense_credibility(images: np.ndarray, texts: np.ndarray, k: int) -> np.ndarray:
    """The definition, one pair at a time, in float64."""
    values = []
    for i in range(len(images)):
        total = 0.0
        for near, judged in ((images, texts), (texts, images)):
            cosines = near @ near[i]
            cosines[i] = -np.inf
            nearest_ones = np.argsort(-cosines, kind="stable")[:k]
            total += (judged[nearest_ones] @ judged[i]).mean()
        values.append((1 + total / 2) / 2)
    return np.array(values)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(1, 9), st.integers(1, 17), st.integers(0, 5))
def test_blockwise_credibility_is_the_dense_one(rows: int, k: int, block: int, seed: int) -> None:
    k = min(k, rows - 1)
    images, texts = unit(rows, 6, seed), unit(rows, 6, seed + 100)
    found = nearest.credibility(images, texts, k, block=block)
    expected = dense_credibility(images.double().numpy(), texts.double().numpy(), k)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)  # float32 cosines, a mean of up to nine
    assert found.min() >= 0
    assert found.max() <= 1


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30), st.integers(1, 8), st.integers(1, 13), st.integers(0, 5))
def test_blockwise_neighbours_are_the_nearest(rows: int, k: int, block: int, seed: int) -> None:
    k = min(k, rows - 1)
    features = unit(rows, 5, seed)
    places = torch.cat([found for _, found in nearest.neighbours(features, k, block=block)])
    cosines = features @ features.T
    cosines.fill_diagonal_(-torch.inf)
    torch.testing.assert_close(cosines.gather(1, places), cosines.topk(k, 1).values)
    assert all(len(set(row)) == k for row in places.tolist())


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "no rule is given"),
        ({"min_score": 0.2}, "need a model"),
        ({"credibility": {}}, "need a model"),
        ({"model": "m", "min_score": 0.2, "keep_fraction": 0.5}, "not both"),
        ({"model": "m", "credibility": {"min": 0.2, "keep_fraction": 0.5}}, "not both"),
        ({"model": "m", "keep_fraction": 0}, "keep_fraction must lie in"),
        ({"model": "m", "credibility": {"k": 0}}, "k must be at least 1"),
        ({"min_sdie": 3}, "did you mean 'min_side'"),
    ],
)
def test_rules_that_do_not_fit(tree: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_tree(FilterOptions, {"shards": "in", "out": "out"} | tree)


def test_nothing_left_changes_nothing(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "out", min_words=1)
    before = keys(tmp_path / "out")
    with pytest.raises(DataError, match=r"no sample meets the rules.*min_side"):
        run(shards, tmp_path / "out", min_side=1000, overwrite=True)
    assert keys(tmp_path / "out") == before


def test_command_with_a_real_model(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(dual_encoder.build(make.tiny_model(), seed=0), tmp_path / "model", overwrite=False)
    command = ["data", "filter", str(shards), str(tmp_path / "out"), f"model=open_clip:{tmp_path / 'model'}", "--quiet"]
    assert main([*command, "keep_fraction=0.5", "credibility.k=3", "workers=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 20
    table = scores(tmp_path / "out")
    assert sum(row["credibility"] != "" for row in table.values()) == 20
    kept = [float(row["score"]) for row in table.values() if row["kept"] == "1"]
    assert min(kept) >= max(float(row["score"]) for row in table.values() if row["kept"] == "0")
    again = [word.replace(str(tmp_path / "out"), str(tmp_path / "again")) for word in command]
    assert main([*again, "keep_fraction=0.5", "credibility.k=3", "workers=1"]) == 0
    assert "let go by" in capsys.readouterr().out
    assert (tmp_path / "again" / "scores.csv").read_bytes() == (tmp_path / "out" / "scores.csv").read_bytes()
    assert main(["data", "filter", str(shards), str(tmp_path / "no"), "model=nowhere", "--quiet"]) == 2
    assert "neither a run folder" in capsys.readouterr().err
