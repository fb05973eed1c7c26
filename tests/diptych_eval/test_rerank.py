"""Retrieval whose nearest candidates are put in the order of a matching head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.diptych_eval.fakes import ColourEncoder
from torch import Tensor

import diptych.testing as make
from diptych.config import from_tree
from diptych.distributed.runtime import Ranks
from diptych.encoder import ModelEncoder
from diptych.errors import DataError
from diptych.models import dual_encoder
from diptych.models.dual_encoder import ModelConfig
from diptych.testing import TINY_CAPTIONER, run_ranks, tiny_sample
from diptych_eval.embedder import Embedder, EmbedSettings
from diptych_eval.reading import picture_of
from diptych_eval.rerank import ranks_within
from diptych_eval.tasks.family import Outcome
from diptych_eval.tasks.retrieval import Retrieval


def matcher() -> ModelEncoder:
    return ModelEncoder(dual_encoder.build(from_tree(ModelConfig, TINY_CAPTIONER | {"matching": True}), seed=0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures with two captions each, a broken one among them."""
    samples = [tiny_sample(f"k{i}", caption=f"picture {i}\nthe number {i}") for i in range(11)]
    samples[4] = make.TinySample("broken", samples[4].members | {"png": b"nothing"})
    make.write_shard(tmp_path / "shards" / "0.tar", samples)
    return tmp_path / "shards"


def run(folder: Path, ranks: Ranks | None = None, encoder: Any = None, **keys: Any) -> Outcome:
    task = from_tree(Retrieval, {"dataset": "d", "path": str(folder)} | keys)
    return task.run(Embedder(encoder or matcher(), EmbedSettings(batch_size=3), ranks=ranks))


def dense(folder: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Similarities and matching logits of all pairs, one at a time."""
    encoder = matcher()
    found = run(folder).matches
    assert found is not None
    logits = torch.zeros(len(found.pictures), len(found.texts))
    for row in range(len(found.pictures)):
        picture = found.pictures.pictures.read(found.pictures.items[row].number)
        image = encoder.view(picture_of(picture))[None]
        for place, text in enumerate(found.texts):
            _, tokens = encoder.model.see(image)
            ids = encoder.model.tokenizer([text])
            _, words = encoder.model.read(ids)
            assert tokens is not None
            assert words is not None
            logits[row, place] = encoder.model.match(tokens, words, ids)[0].detach()
    return found.pictures.features @ found.text_features.T, logits, found.texts


def by_hand(scores: Tensor, logits: Tensor, right: Tensor, k: int) -> list[int]:
    """Nearest k by logit, then the others by score; the place of the first right one."""
    places = []
    for row in range(len(scores)):
        order = scores[row].argsort(descending=True).tolist()
        order = sorted(order[:k], key=lambda place, row=row: -logits[row, place]) + order[k:]
        wrong_before = 0
        for place in order:
            if right[row, place]:
                break
            wrong_before += 1
        places.append(wrong_before + 1)
    return places


@pytest.mark.parametrize("k", [1, 4, 50])
def test_ranks_are_those_of_all_pairs_by_hand(folder: Path, k: int) -> None:
    scores, logits, texts = dense(folder)
    keys = [f"k{i}" for i in range(11) if i != 4]
    right = torch.tensor([[text in (f"picture {key[1:]}", f"the number {key[1:]}") for text in texts] for key in keys])
    found = run(folder, rerank=k).matches
    assert found is not None
    assert found.image_ranks.tolist() == by_hand(scores, logits, right, k)
    assert found.text_ranks.tolist() == by_hand(scores.T, logits.T, right.T, k)
    if k > 1:
        plain = run(folder).matches
        assert plain is not None
        assert found.image_ranks.tolist() != plain.image_ranks.tolist()


def metrics_of(_rank: int, folder: Path, world: int) -> dict[str, float]:
    return run(folder, Ranks(_rank, world), rerank=4).metrics


@pytest.mark.distributed
def test_two_processes_find_the_same(folder: Path) -> None:
    alone = run(folder, rerank=4).metrics
    assert all(found == alone for found in run_ranks(metrics_of, 2, folder, 2))


def test_ties_and_numbers_that_are_none_count_against_the_model() -> None:
    right = torch.tensor([[True, False, False], [False, True, True], [False, False, False], [True, False, False]])
    nan = float("nan")
    logits = torch.tensor([[1.0, 1.0, 0.0], [5.0, 1.0, 2.0], [1.0, 2.0, 3.0], [nan, 0.0, 1.0]])
    anchors = torch.arange(4).repeat_interleave(3)
    assert ranks_within(anchors, logits.flatten(), right.flatten(), 4).tolist() == [2, 2, 0, 3]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert ranks_within(anchors[order], logits.flatten()[order], right.flatten()[order], 4).tolist() == [2, 2, 0, 3]


def test_a_model_without_a_head_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="no matching head"):
        run(folder, encoder=ColourEncoder(), rerank=3)
    plain = ModelEncoder(dual_encoder.build(from_tree(ModelConfig, TINY_CAPTIONER), seed=0))
    with pytest.raises(DataError, match="no matching head"):
        run(folder, encoder=plain, rerank=3)
