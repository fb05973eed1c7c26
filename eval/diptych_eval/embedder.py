"""Pictures and texts to features, pictures to captions: once for all tasks, shared among the ranks, kept on the disk.

Rank r of W makes batches r, r + W, r + 2W, …, and every rank gets them all. A batch holds the same rows however many
ranks there are, so the features are the same bit for bit.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from jaxtyping import Float, Int, UInt8
from PIL.Image import Image
from torch import Tensor

from diptych import generate
from diptych import log as logs
from diptych.config import Config
from diptych.data.faults import FaultLog
from diptych.data.images import evaluation_view
from diptych.distributed.collectives import gather_objects
from diptych.distributed.runtime import Ranks
from diptych.encoder import ModelEncoder
from diptych.errors import DataError, DiptychError
from diptych.generate import GenerateConfig
from diptych_eval.encoder import Encoder
from diptych_eval.pictures import Pictures
from diptych_eval.reading import Batch, Item, View, batches, picture_of
from diptych_eval.store import FeatureStore

log = logging.getLogger(__name__)
T = TypeVar("T")
_TEXT_BATCH = 512
_THUMBNAIL = 64
_KEPT_TEXTS = 16


class Change(Protocol):
    """Something done to every picture before the model sees it."""

    @property
    def name(self) -> str:
        """Tells changes apart, their settings included."""
        ...

    def __call__(self, picture: Image, key: str) -> Image:
        """The changed picture; what is random in it depends on the key alone."""
        ...


@dataclass(frozen=True)
class SeenSet:
    """A set after a pass; unusable entries are left out."""

    items: tuple[Item, ...]
    faults: FaultLog
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.items)

    def thumbnail(self, row: int) -> UInt8[Tensor, "3 side side"]:
        """What people see: 64 pixels, whatever the model's size."""
        return evaluation_view(picture_of(self.pictures.read(self.items[row].number)), _THUMBNAIL)


@dataclass(frozen=True)
class EmbeddedSet(SeenSet):
    """Pictures and their features."""

    features: Float[Tensor, "N D"]


@dataclass(frozen=True)
class CaptionedSet(SeenSet):
    """Pictures and what the model wrote about each."""

    captions: tuple[str, ...]


@dataclass(frozen=True)
class EmbedSettings(Config):
    """How features are made."""

    batch_size: int = 256
    """Pictures per forward pass."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the towers; features are float32 either way."""
    threads: int = 4
    """Pictures decoded at the same time, per rank."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.threads < 1:
            raise ValueError("batch_size and threads must be at least 1")


class Embedder:
    """One model's features of whatever tasks ask for. Every rank must ask for the same, in the same order."""

    def __init__(
        self,
        encoder: Encoder,
        settings: EmbedSettings | None = None,
        *,
        ranks: Ranks | None = None,
        store: FeatureStore | None = None,
    ) -> None:
        """
        Args:
            ranks: those that share the work; none: this process alone.
            store: where features are kept from call to call; none: nowhere.
        """
        self.encoder = encoder
        self.ranks = ranks or Ranks(0, 1)
        self._settings = settings or EmbedSettings()
        self._store = store if self.ranks.is_main else None  # the first rank reads and writes for all
        self._sets: dict[tuple[str, str, str], EmbeddedSet] = {}
        self._texts: dict[str, Tensor] = {}
        self.fingerprint = f"{encoder.fingerprint}-{self._settings.precision}"
        """Differs where features do."""

    def digest(self, files: Sequence[str]) -> str:
        """A checksum of the contents of files and folders; empty where nothing is kept. Every rank must call."""
        return self._from_first(self._store.digest(files) if self._store is not None else "")

    def pictures(self, pictures: Pictures, change: Change | None = None) -> EmbeddedSet:
        """A set's features, in its order. Every rank must call.

        Raises:
            DataError: nothing in it can be used.
        """
        name = (pictures.where, pictures.variant, change.name if change is not None else "")
        if name in self._sets:
            return self._sets[name]
        key = self._key(pictures, *name)
        kept = self._load(key)
        if kept is not None:
            found = EmbeddedSet(*_noted(kept[1]), pictures, kept[0])
        else:
            found = self._embed(pictures, change)
            self._save(key, found.features, _notes(found))
        if change is None:  # changed pictures are asked for once, in many ways
            self._sets[name] = found
        return found

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Unit-norm features of texts, equal ones encoded once. Every rank must call."""
        key = _hash(self.fingerprint, *texts)
        if key not in self._texts:
            kept = self._load(key)
            features = kept[0] if kept is not None else self._embed_texts(texts)
            if kept is None:
                self._save(key, features, {"texts": len(texts)})
            while len(self._texts) >= _KEPT_TEXTS:
                del self._texts[next(iter(self._texts))]
            self._texts[key] = features
        return self._texts[key]

    def captions(self, pictures: Pictures, config: GenerateConfig) -> CaptionedSet:
        """What the model writes about each picture of a set, in its order. Every rank must call.

        Raises:
            DataError: the model writes no captions, or nothing in the set can be used.
            ConfigError: captions cannot be written in this way.
        """
        model = self.encoder.model if isinstance(self.encoder, ModelEncoder) else None
        if model is None or model.text_decoder is None:
            raise DataError(f"the model writes no captions · {pictures.where} · evaluate a captioner")
        key = self._key(pictures, pictures.where, pictures.variant, repr(config))
        kept = self._load(key)
        if kept is not None:
            return CaptionedSet(*_noted(kept[1]), pictures, tuple(kept[1]["captions"]))
        device = model.logit_scale.device

        def write(batch: Batch) -> list[str]:
            return generate.captions(model, batch.images.to(device), config, first=batch.items[0].number)

        view = self.encoder.view
        parts, items, faults = self._pass(pictures, lambda picture, _: view(picture), write, title="captions")
        found = CaptionedSet(items, faults, pictures, tuple(text for part in parts for text in part))
        self._save(key, torch.empty(0), _notes(found) | {"captions": found.captions})
        return found

    def matches(
        self, found: EmbeddedSet, texts: Sequence[str], rows: Int[Tensor, " P"], places: Int[Tensor, " P"]
    ) -> Float[Tensor, " P"]:
        """Logits of the matching head, of rows of a set and places among texts. Every rank must call.

        Raises:
            DataError: the model has no such head.
        """
        encoder = self.encoder if isinstance(self.encoder, ModelEncoder) else None
        if encoder is None or encoder.model.match_head is None:
            raise DataError(
                f"the model has no matching head · {found.pictures.where} · leave out rerank, or train one with "
                "model.matching"
            )
        row_of = {item.number: row for row, item in enumerate(found.items)}
        order = rows.argsort(stable=True)
        ends = torch.searchsorted(rows[order], torch.arange(len(found)), right=True).tolist()
        pairs_of = [order[first:last] for first, last in zip([0, *ends], ends, strict=False)]

        def match(batch: Batch) -> Tensor:
            pairs = [pairs_of[row_of[item.number]] for item in batch.items]
            images = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(some) for some in pairs]))
            return encoder.match(batch.images, texts, images, places[torch.cat(pairs)])

        view = self.encoder.view
        parts, _, _ = self._pass(found.pictures, lambda picture, _: view(picture), match, title="pairs")
        return torch.empty(len(rows)).index_copy_(0, order, torch.cat(parts))

    def _key(self, pictures: Pictures, *name: str) -> str:
        return _hash(self.fingerprint, self.digest(pictures.files), repr(self.encoder.view), *name)

    def _embed(self, pictures: Pictures, change: Change | None) -> EmbeddedSet:
        def view(picture: Image, key: str) -> Tensor:
            return self.encoder.view(change(picture, key) if change is not None else picture)

        def embed(batch: Batch) -> Tensor:
            return self.encoder.encode_image(batch.images)

        parts, items, faults = self._pass(pictures, view, embed, title="pictures")
        return EmbeddedSet(items, faults, pictures, torch.cat(parts))

    def _pass(
        self, pictures: Pictures, view: View, make: Callable[[Batch], T], *, title: str
    ) -> tuple[list[T], tuple[Item, ...], FaultLog]:
        """What is made of each batch that has something usable, with what is in them all."""
        size = self._settings.batch_size
        ranges = [range(first, min(first + size, len(pictures))) for first in range(0, len(pictures), size)]
        mine = ranges[self.ranks.rank :: self.ranks.world_size]
        made: list[tuple[list[T], tuple[Item, ...], FaultLog]] = []
        problem: DiptychError | None = None
        title = f"{title} of {pictures.where}"
        try:
            with logs.progress(title, len(mine), quiet=not self.ranks.is_main) as bar, self._autocast():
                for batch in batches(pictures, view, mine, threads=self._settings.threads):
                    made.append(([make(batch)] if batch.items else [], batch.items, batch.faults))
                    bar.advance()
        except DiptychError as error:
            problem = error
        parts = self._in_order(made, problem)
        faults = FaultLog()
        for _, _, more in parts:
            faults.merge(more)
        items = tuple(item for _, some, _ in parts for item in some)
        if not items:
            raise DataError(f"no usable sample ({faults.summary()}) · {pictures.where} · check the set")
        if faults.unusable and self.ranks.is_main:
            log.warning("samples left out of evaluation: %s", faults.summary())
        return [one for some, _, _ in parts for one in some], items, faults

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts of like length together, so that little is padding."""
        different = sorted(set(texts), key=lambda text: (len(text), text))
        parts = [different[first : first + _TEXT_BATCH] for first in range(0, len(different), _TEXT_BATCH)]
        made: list[Tensor] = []
        with self._autocast():
            made = [self.encoder.encode_text(part) for part in parts[self.ranks.rank :: self.ranks.world_size]]
        features = torch.cat(self._in_order(made)) if parts else self.encoder.encode_text([])
        row = {text: number for number, text in enumerate(different)}
        return features[torch.tensor([row[text] for text in texts], dtype=torch.long)]

    def _autocast(self) -> AbstractContextManager[Any]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.autocast(device, torch.bfloat16, enabled=self._settings.precision == "bf16")

    # --- ranks and disk ------------------------------------------------------------------------------------------

    def _in_order(self, made: list[T], problem: DiptychError | None = None) -> list[T]:
        """Every rank's batches, in the order of the whole; where one could not, all raise what it met."""
        shared = gather_objects((made, problem)) if self.ranks.world_size > 1 else [(made, problem)]
        for _, met in shared:
            if met is not None:
                raise met
        count = sum(len(part) for part, _ in shared)
        return [shared[number % len(shared)][0][number // len(shared)] for number in range(count)]

    def _from_first(self, value: T) -> T:
        """What the first rank has."""
        return gather_objects(value)[0] if self.ranks.world_size > 1 else value

    def _load(self, key: str) -> tuple[Tensor, Any] | None:
        return self._from_first(self._store.load(key) if self._store is not None else None)

    def _save(self, key: str, features: Tensor, notes: Any) -> None:
        if self._store is not None:
            self._store.save(key, features, notes)


def _notes(found: SeenSet) -> dict[str, Any]:
    return {"items": [asdict(item) for item in found.items], "faults": found.faults.to_json()}


def _noted(notes: dict[str, Any]) -> tuple[tuple[Item, ...], FaultLog]:
    """The reverse."""
    return tuple(map(Item.from_json, notes["items"])), FaultLog.from_json(notes["faults"])


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
