"""One raw sample to what training needs of it: pixels, captions, the numbers that decide its augmentation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from diptych.data import captions as texts
from diptych.data.augment import augment_all, draw
from diptych.data.batch import CounterRows, Rows
from diptych.data.faults import UnusableSample
from diptych.data.images import ImageConfig, picture_extension, training_view
from diptych.data.shards import RawSample
from diptych.data.sources import Source
from diptych.data.stages import Form
from diptych.data.tokens import Tokenizer, shorten
from diptych.seeding import derive


@dataclass(frozen=True)
class Counter:
    """A picture of a wrong caption."""

    caption: str
    pixels: np.ndarray
    """As `Prepared.pixels`."""


@dataclass(frozen=True)
class Prepared:
    """One usable sample."""

    key: str
    identity: int
    """Of the sample, wherever its shard lies."""
    caption: str
    hard_captions: tuple[str, ...]
    second_caption: str | None
    pixels: np.ndarray
    """uint8 [3, size, size], or RGBA [4, size, size] where the picture is transparent."""
    draws: np.ndarray
    """What decides its augmentation."""
    label: int | None
    """Its class, where the source brings classes."""
    counter: Counter | None = None
    """Where the source brings counter-images and this sample has one."""
    positive_captions: tuple[str, ...] = ()
    """Right ones beside the caption."""


def prepare(raw: RawSample, source: Source, size: int, *, rng: np.random.Generator, cache: "PixelCache") -> Prepared:
    """A training view of a sample, by the rules of its source.

    Args:
        size: side of the view, pixels.
        rng: decides all that is random about it; the order of the calls below is part of what a seed means.

    Raises:
        UnusableSample: it cannot be used.
    """
    config = source.captions
    captions = texts.parse(raw.members)
    caption = texts.choose(captions, config.views, config, rng)
    pixels = _pixels(raw, source.images, size, rng=rng, cache=cache)
    draws = draw(rng)
    hard = texts.choose_hard(captions, config, rng)
    second = texts.choose(captions, config.second_views, config, rng) if config.second_views else None
    identity = derive(0, source.name, source.labels[raw.shard], raw.key, raw.number)
    label = class_number(raw.members) if source.with_classes else None
    counter = _counter(raw, captions, source, size, rng=rng) if source.with_counters else None
    positive = texts.choose_positive(captions, caption, config, rng)
    return Prepared(raw.key, identity, caption, hard, second, pixels, draws, label, counter, positive)


def _counter(
    raw: RawSample, captions: texts.Captions, source: Source, size: int, *, rng: np.random.Generator
) -> Counter | None:
    """The first wrong caption that has a picture. Raises UnusableSample where that cannot be decoded."""
    records = captions.document.get("negatives")
    for record in records if isinstance(records, list) else ():
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            continue
        picture = raw.members.get(str(record.get("image")))
        caption = texts.clean(record["text"], max_chars=source.captions.max_chars, form=source.captions.form)
        if picture is not None and caption:
            return Counter(caption, training_view(picture, size, source.images, rng))
    return None


def class_number(members: Mapping[str, bytes]) -> int:
    """What the .cls member says. Raises UnusableSample `bad_label`."""
    text = members.get("cls", b"")[:20].strip()
    if not text.isdigit():
        raise UnusableSample("bad_label", f"{text.decode(errors='replace')!r} is no number of a class")
    return int(text)


def _pixels(
    raw: RawSample, config: ImageConfig, size: int, *, rng: np.random.Generator, cache: "PixelCache"
) -> np.ndarray:
    whole = config.min_crop == 1
    pixels = cache.get(raw, size) if whole else None
    if pixels is None:
        pixels = training_view(picture_bytes(raw.members), size, config, rng)
        if whole:
            cache.put(raw, pixels)
    return pixels


def picture_bytes(members: Mapping[str, bytes]) -> bytes:
    """The member that holds the picture. Raises UnusableSample `no_picture`."""
    extension = picture_extension(members)
    if extension is None:
        raise UnusableSample("no_picture")
    return members[extension]


class PixelCache:
    """Remembers prepared pictures where every epoch prepares them alike (no random crop): the first that fit stay,
    until a stage of the run wants another size, to which they would be of no use."""

    def __init__(self, max_bytes: int) -> None:
        self._left = self._max_bytes = max_bytes
        self._size = 0
        self._kept: dict[tuple[str, int], np.ndarray] = {}

    def get(self, raw: RawSample, size: int) -> np.ndarray | None:
        """The pixels at this size, if they are known."""
        return self._kept.get((raw.shard, raw.number)) if size == self._size else None

    def put(self, raw: RawSample, pixels: np.ndarray) -> None:
        """Keeps the pixels while there is room."""
        if pixels.shape[-1] != self._size:
            self._size, self._left = pixels.shape[-1], self._max_bytes
            self._kept.clear()
        if pixels.nbytes <= self._left:
            self._left -= pixels.nbytes
            self._kept[raw.shard, raw.number] = np.ascontiguousarray(pixels)


def rows(
    samples: Sequence[Prepared],
    of: Sequence[int],
    *,
    sources: Sequence[Source],
    form: Form,
    tokenizer: Tokenizer,
    teacher_tokenizer: Tokenizer | None = None,
) -> Rows:
    """Samples side by side.

    Args:
        of: the number of each sample's source.
        form: that of the batch they go into; the views have its size already.
        teacher_tokenizer: of a teacher, which reads the captions in its own ids and as long as it takes them.
    """
    captions = [sample.caption for sample in samples]
    hard, positive = [sample.hard_captions for sample in samples], [sample.positive_captions for sample in samples]
    second = [sample.second_caption for sample in samples if sample.second_caption is not None]
    config = sources[0].captions  # the settings see to it that all sources bring the same kinds of captions
    return Rows(
        images=_views(samples, of, sources, form.image_size),
        tokens=encode(captions, tokenizer, form.context_length),
        caption_ids=_ids(captions),
        sample_ids=torch.tensor([sample.identity for sample in samples], dtype=torch.long),
        hard_tokens=_several(hard, config.hard, tokenizer, form),
        hard_ids=_ids([text for texts in hard for text in texts]).view(len(samples), -1),
        positive_tokens=_several(positive, config.positive, tokenizer, form),
        second_tokens=encode(second, tokenizer, form.context_length) if config.second_views else None,
        teacher_tokens=teacher_tokenizer(captions) if teacher_tokenizer is not None else None,
        labels=_labels(samples) if sources[0].with_classes else None,
        counters=_counters(samples, of, sources, form, tokenizer) if sources[0].with_counters else None,
    )


def _ids(captions: Sequence[str]) -> Int[Tensor, " n"]:
    return torch.tensor([derive(0, caption) for caption in captions], dtype=torch.long)


def _several(
    captions: Sequence[Sequence[str]],
    config: texts.HardCaptionConfig | texts.PositiveCaptionConfig | None,
    tokenizer: Tokenizer,
    form: Form,
) -> Int[Tensor, "n K context"]:
    """Tokens of K captions of each sample; K is 0 where none are configured."""
    count = config.count if config is not None else 0
    tokens = encode([text for some in captions for text in some], tokenizer, form.context_length)
    return tokens.view(len(captions), count, form.context_length)


def _counters(
    samples: Sequence[Prepared], of: Sequence[int], sources: Sequence[Source], form: Form, tokenizer: Tokenizer
) -> CounterRows:
    """Rows for all samples; those without a counter-image have their own picture and caption there, which nothing uses.
    It is augmented as the sample's own is: only what it shows is another."""
    stand_in = [
        replace(sample, pixels=sample.counter.pixels, caption=sample.counter.caption) if sample.counter else sample
        for sample in samples
    ]
    return CounterRows(
        images=_views(stand_in, of, sources, form.image_size),
        tokens=encode([sample.caption for sample in stand_in], tokenizer, form.context_length),
        present=torch.tensor([sample.counter is not None for sample in samples]),
        caption_ids=_ids([sample.caption for sample in stand_in]),
    )


def _labels(samples: Sequence[Prepared]) -> Int[Tensor, " n"]:
    return torch.tensor([sample.label for sample in samples], dtype=torch.long)


def _views(
    samples: Sequence[Prepared], of: Sequence[int], sources: Sequence[Source], size: int
) -> UInt8[Tensor, "n 3 side side"]:
    """The augmented pictures, each by the settings of its source."""
    images = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
    for number, source in enumerate(sources):
        places = [place for place, its in enumerate(of) if its == number]
        if places:
            pixels = [samples[place].pixels for place in places]
            draws = np.stack([samples[place].draws for place in places])
            views = augment_all(pixels, draws, source.images.augment)
            if len(places) == len(samples):
                return views
            images[places] = views
    return images


def encode(captions: Sequence[str], tokenizer: Tokenizer, length: int) -> Int[Tensor, "n length"]:
    """Token ids, at most `length` of each caption; of no captions, none."""
    return shorten(tokenizer(captions), length) if captions else torch.empty(0, length, dtype=torch.long)
