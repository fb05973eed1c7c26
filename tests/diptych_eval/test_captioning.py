"""The task captioning, with a tiny captioner of random weights: what it writes is nonsense, and the same each time."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.diptych.models import language_models
from tests.diptych_eval.fakes import ColourEncoder

import diptych.testing as make
from diptych.config import from_tree
from diptych.distributed.runtime import Ranks
from diptych.encoder import ModelEncoder
from diptych.errors import ConfigError, DataError
from diptych.generate import GenerateConfig, captions
from diptych.models import dual_encoder
from diptych.models.dual_encoder import ModelConfig
from diptych.testing import TINY_CAPTIONER, TinySample, run_ranks, tiny_model, tiny_sample
from diptych_eval import caption_scores, items, metrics
from diptych_eval.caption_words import words
from diptych_eval.clip_benchmark import rows
from diptych_eval.embedder import Embedder, EmbedSettings
from diptych_eval.folders import open_folders
from diptych_eval.report.html import write_report
from diptych_eval.suite import EvalConfig, evaluate
from diptych_eval.tasks.captioning import Captioning
from diptych_eval.tasks.family import Outcome

SHORT = {"method": "greedy", "max_length": 6}


def captioner() -> ModelEncoder:
    return ModelEncoder(dual_encoder.build(from_tree(ModelConfig, TINY_CAPTIONER), seed=0))


def shards(root: Path, count: int = 11) -> Path:
    """Pictures with two captions each, one of them broken."""
    samples = [tiny_sample(f"k{i}", caption=f"picture {i}\nthe number {i}") for i in range(count)]
    samples[4] = TinySample("broken", samples[4].members | {"png": b"nothing"})
    make.write_shard(root / "0.tar", samples)
    return root


def task(folder: Path, **keys: Any) -> Captioning:
    return from_tree(Captioning, {"dataset": "d", "path": str(folder), "generate": SHORT} | keys)


def run(task: Captioning, ranks: Ranks | None = None) -> Outcome:
    return task.run(Embedder(captioner(), EmbedSettings(batch_size=3), ranks=ranks))


def test_the_figures_are_those_of_what_was_written(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    found = run(task(folder))
    (table,) = found.items
    assert found.num_items == 10
    assert table.keys == tuple(f"k{i}" for i in range(11) if i != 4)
    encoder = captioner()
    pictures = [Image.open(io.BytesIO(tiny_sample(f"k{i}").members["png"])) for i in range(11) if i != 4]
    pixels = torch.stack([encoder.view(picture) for picture in pictures])
    expected = captions(encoder.model, pixels, GenerateConfig(**SHORT))
    assert table.texts == {"caption": tuple(expected)}
    written = [words(text) for text in expected]
    references = [[words(f"picture {i}"), words(f"the number {i}")] for i in range(11) if i != 4]
    assert table.columns["cider"].equal(caption_scores.cider(written, references))
    assert found.metrics["cider"] == float(table.columns["cider"].mean())
    bleu = caption_scores.bleu(caption_scores.bleu_counts(written, references).sum(0)).tolist()
    assert [found.metrics[f"bleu_{order}"] for order in (1, 2, 3, 4)] == bleu
    assert found.notes == {"num_references": 20}


def test_a_language_model_writes_too(tmp_path: Path) -> None:
    encoder = ModelEncoder(language_models.build(language_models.folder(tmp_path / "lm", language_models.llama())))
    folder = shards(tmp_path / "data")
    found = task(folder).run(Embedder(encoder, EmbedSettings(batch_size=3)))
    pictures = [Image.open(io.BytesIO(tiny_sample(f"k{i}").members["png"])) for i in range(11) if i != 4]
    expected = captions(encoder.model, torch.stack([encoder.view(p) for p in pictures]), GenerateConfig(**SHORT))
    assert found.items[0].texts == {"caption": tuple(expected)}


def _found(rank: int, folder: Path, world_size: int, method: str) -> tuple[Any, ...]:
    config = {"method": method, "max_length": 6, "beams": 3}
    found = run(task(folder, generate=config), Ranks(rank, world_size))
    return found.items[0].texts, found.metrics, found.intervals


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["greedy", "beam", "sample", "contrastive"])
def test_ranks_write_what_one_process_does(tmp_path: Path, method: str) -> None:
    alone = _found(0, shards(tmp_path), 1, method)
    assert run_ranks(_found, 2, tmp_path, 2, method) == [alone, alone]


def test_intervals_of_bleu_are_of_whole_sets_drawn(tmp_path: Path) -> None:
    counts = torch.tensor(
        [[3, 1, 0, 0, 5, 4, 3, 2, 5, 5], [2, 2, 1, 0, 4, 3, 2, 1, 4, 6], [0, 0, 0, 0, 2, 1, 0, 0, 2, 3]]
    )
    draws = metrics.bootstrap_sums(counts, samples=400)
    assert draws.shape == (400, 10)
    # each draw is three rows: sums of the words written are sums of 5, 4 and 2
    assert set(draws[:, 8].tolist()) <= {a + b + c for a in (5, 4, 2) for b in (5, 4, 2) for c in (5, 4, 2)}
    assert draws[:, 8].mean().item() == pytest.approx(11, abs=4 * (3 * 14 / 9 / 400) ** 0.5)  # four standard errors
    low, high = metrics.percentiles(caption_scores.bleu(draws)[:, 0])
    assert low < caption_scores.bleu(counts.sum(0))[0].item() < high


def test_results_are_kept_and_shown(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    tree = {"tasks": [{"type": "captioning", "dataset": "d", "path": str(folder), "generate": SHORT}]}
    config = from_tree(EvalConfig, tree)
    (first,) = evaluate(captioner(), config, out=tmp_path / "a")
    (again,) = evaluate(captioner(), config, out=tmp_path / "a")
    assert again == first
    assert set(first.intervals) == {"cider", "rouge_l", *(f"bleu_{order}" for order in (1, 2, 3, 4))}
    assert first.protocol["generate"]["method"] == "greedy"
    (table,) = items.read(tmp_path / "a" / "items", first)
    assert len(table.texts["caption"]) == 10
    text = write_report([tmp_path / "a", tmp_path / "a"], tmp_path / "both.html").read_text()
    assert "Captioning" in text
    assert text.count('<article class="query card">') == 10
    assert "the number 3" in text
    (row,) = rows(open_folders([tmp_path / "a"])[0])
    assert row["task"] == "captioning"
    assert row["metrics"]["CIDEr"] == first.metrics["cider"]


def test_what_was_written_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "data")
    tree = {"tasks": [{"type": "captioning", "dataset": "d", "path": str(folder), "generate": SHORT}]}
    evaluate(captioner(), from_tree(EvalConfig, tree), out=tmp_path / "a")
    (tmp_path / "a" / "results.json").unlink()
    kept = [json.loads(path.read_text()) for path in (tmp_path / "a" / "features").glob("*.json")]
    assert [len(one["captions"]) for one in kept if "captions" in one] == [10]
    monkeypatch.setattr("diptych_eval.embedder.Embedder._pass", None)
    evaluate(captioner(), from_tree(EvalConfig, tree), out=tmp_path / "a")


@pytest.mark.parametrize("encoder", [ColourEncoder(), ModelEncoder(dual_encoder.build(tiny_model(), seed=0))])
def test_a_model_that_writes_nothing_is_one_line(tmp_path: Path, encoder: Any) -> None:
    with pytest.raises(DataError, match=r"the model writes no captions · .* · evaluate a captioner") as caught:
        task(shards(tmp_path)).run(Embedder(encoder))
    assert "\n" not in str(caught.value)


def test_other_bad_input_is_one_line(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    with pytest.raises(DataError, match="sample 'k0' has no caption in"):
        run(task(folder, forms=[["other"]]))
    with pytest.raises(ConfigError, match="layer_contrast is 9, the decoder has 2 layers"):
        run(task(folder, generate=SHORT | {"layer_contrast": 9}))
    with pytest.raises(ConfigError, match=r"generate.*beams must be at least 1"):
        task(folder, generate={"beams": 0})
