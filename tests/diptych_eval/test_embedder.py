"""One pass, the same on any number of ranks, kept as long as model, files and view stay."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.diptych_eval.fakes import ColourEncoder
from torch import Tensor

import diptych.testing as make
from diptych.distributed.runtime import Ranks
from diptych.encoder import ModelEncoder
from diptych.errors import DataError
from diptych.models import dual_encoder
from diptych.testing import TinySample, run_ranks, tiny_model, tiny_sample
from diptych_eval.embedder import Embedder, EmbedSettings
from diptych_eval.pictures import FilePictures, PictureFile, ShardPictures
from diptych_eval.store import FeatureStore

TEXTS = ["a red fox", "fox", "a red fox", "the tall tree by the river", "b"] * 300


def shards(root: Path, count: int = 40) -> Path:
    samples = [tiny_sample(f"k{i}") for i in range(count)]
    samples[7] = TinySample("blind", {"txt": b"no picture"})
    samples[20] = TinySample("broken", samples[20].members | {"png": b"nothing"})
    make.write_shard(root / "0.tar", samples[:25])
    make.write_shard(root / "1.tar", samples[25:])
    return root


def _features(rank: int, folder: Path, world_size: int) -> tuple[Tensor, Tensor, list[str], int]:
    encoder = ModelEncoder(dual_encoder.build(tiny_model(), seed=0))
    embedder = Embedder(encoder, EmbedSettings(batch_size=6), ranks=Ranks(rank, world_size))
    found = embedder.pictures(ShardPictures(str(folder)))
    return found.features, embedder.texts(TEXTS), [item.key for item in found.items], found.faults.unusable


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_work_and_find_the_same_to_the_last_bit(tmp_path: Path, world_size: int) -> None:
    folder = shards(tmp_path)
    features, texts, keys, faults = _features(0, folder, 1)
    assert len(keys) == 38
    assert faults == 2
    for found in run_ranks(_features, world_size, folder, world_size):
        assert found[0].equal(features)
        assert found[1].equal(texts)
        assert found[2:] == (keys, faults)


def _broken(rank: int, folder: Path) -> str:
    class Bad(ShardPictures):
        def read(self, number: int) -> object:  # type: ignore[override]
            if number == 13:
                raise DataError("the disk is gone · x · y")
            return super().read(number)

    embedder = Embedder(ColourEncoder(), EmbedSettings(batch_size=6), ranks=Ranks(rank, 2))
    try:
        embedder.pictures(Bad(str(folder)))
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_what_one_rank_meets_all_ranks_raise(tmp_path: Path) -> None:
    assert run_ranks(_broken, 2, shards(tmp_path)) == ["the disk is gone · x · y"] * 2


def test_equal_texts_are_encoded_once_and_come_in_order() -> None:
    asked: list[str] = []

    class Encoder(ColourEncoder):
        def encode_text(self, texts):  # type: ignore[no-untyped-def]
            asked.extend(texts)
            return super().encode_text(texts)

    found = Embedder(Encoder()).texts(TEXTS)
    assert sorted(asked) == sorted(set(TEXTS))
    assert found.equal(ColourEncoder().encode_text(TEXTS))


def test_features_are_kept_until_model_view_or_files_change(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")

    def embed(encoder: ColourEncoder, precision: str = "fp32") -> Tensor:
        settings = EmbedSettings(precision=precision)  # type: ignore[arg-type]
        return (
            Embedder(encoder, settings, store=FeatureStore(tmp_path / "kept"))
            .pictures(ShardPictures(str(folder)))
            .features
        )

    def made(*arguments: str) -> bool:
        encoder = ColourEncoder(*arguments[:1])
        embed(encoder, *arguments[1:])
        return encoder.num_images > 0

    assert made("a")
    assert not made("a")
    assert made("b")
    assert made("a", "bf16")
    make.write_shard(folder / "1.tar", [tiny_sample("new")])
    assert made("a")
    assert not made("a")


def test_damaged_features_are_made_again(tmp_path: Path) -> None:
    folder, store = shards(tmp_path / "shards"), FeatureStore(tmp_path / "kept")
    whole = Embedder(ColourEncoder(), store=store).pictures(ShardPictures(str(folder)))
    (file,) = (tmp_path / "kept").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    encoder = ColourEncoder()
    again = Embedder(encoder, store=store).pictures(ShardPictures(str(folder)))
    assert encoder.num_images
    assert again.features.equal(whole.features)
    assert again.items == whole.items
    kept = Embedder(ColourEncoder(), store=store).pictures(ShardPictures(str(folder)))
    assert (kept.items, kept.faults) == (whole.items, whole.faults)


def test_the_same_files_may_be_several_sets(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 16), (255, 0, 0))
    picture.paste((0, 0, 255), (16, 0, 32, 16))
    picture.save(tmp_path / "two.png")
    path = tmp_path / "two.png"
    embedder = Embedder(ColourEncoder(), store=FeatureStore(tmp_path / "kept"))
    left, right = (
        embedder.pictures(FilePictures("boxes", [PictureFile(path, "two.png", number, box)]))
        for number, box in enumerate([(0, 0, 16, 16), (16, 0, 32, 16)])
    )
    assert not torch.allclose(left.features, right.features)
    assert (left.items[0].labels, right.items[0].labels) == ((0,), (1,))
    assert left.thumbnail(0)[:, 5, 5].tolist() == [255, 0, 0]


def test_a_set_without_any_usable_picture_is_refused(tmp_path: Path) -> None:
    make.write_shard(tmp_path / "0.tar", [TinySample("blind", {"txt": b"x"})])
    with pytest.raises(DataError, match=r"no usable sample .*no_picture"):
        Embedder(ColourEncoder()).pictures(ShardPictures(str(tmp_path)))
