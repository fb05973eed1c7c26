"""Pictures and texts to features: each set once for all tasks, shared among the ranks, kept on the disk.

Rank r of W makes batches r, r + W, r + 2W, …, and every rank gets them all. A batch holds the same rows however many
ranks there are, so the features are the same bit for bit.
"""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from jaxtyping import Float, UInt8
from PIL.Image import Image
from torch import Tensor

from diptych import log as logs
from diptych.config import Config
from diptych.data.faults import FaultLog
from diptych.data.images import evaluation_view
from diptych.distributed.collectives import gather_objects
from diptych.distributed.runtime import Ranks
from diptych.errors import DataError, DiptychError
from diptych_eval.encoder import Encoder
from diptych_eval.pictures import Pictures
from diptych_eval.reading import Item, batches, picture_of
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
class EmbeddedSet:
    """A set after its one pass; unusable entries are left out."""

    features: Float[Tensor, "N D"]
    items: tuple[Item, ...]
    faults: FaultLog
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.items)

    def thumbnail(self, row: int) -> UInt8[Tensor, "3 side side"]:
        """What people see: 64 pixels, whatever the model's size."""
        return evaluation_view(picture_of(self.pictures.read(self.items[row].number)), _THUMBNAIL)


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
        key = _hash(self.fingerprint, self.digest(pictures.files), repr(self.encoder.view), *name)
        kept = self._load(key)
        if kept is not None:
            features, notes = kept
            faults = FaultLog.from_json(notes["faults"])
            found = EmbeddedSet(features, tuple(map(Item.from_json, notes["items"])), faults, pictures)
        else:
            found = self._embed(pictures, change)
            items = [asdict(item) for item in found.items]
            self._save(key, found.features, {"items": items, "faults": found.faults.to_json()})
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

    def _embed(self, pictures: Pictures, change: Change | None) -> EmbeddedSet:
        def view(picture: Image, key: str) -> Tensor:
            return self.encoder.view(change(picture, key) if change is not None else picture)

        size = self._settings.batch_size
        ranges = [range(first, min(first + size, len(pictures))) for first in range(0, len(pictures), size)]
        mine = ranges[self.ranks.rank :: self.ranks.world_size]
        made: list[tuple[Tensor, tuple[Item, ...], FaultLog]] = []
        problem: DiptychError | None = None
        title = f"pictures of {pictures.where}"
        try:
            with logs.progress(title, len(mine), quiet=not self.ranks.is_main) as bar, self._autocast():
                for batch in batches(pictures, view, mine, threads=self._settings.threads):
                    features = self.encoder.encode_image(batch.images) if batch.items else torch.empty(0)
                    made.append((features, batch.items, batch.faults))
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
        return EmbeddedSet(torch.cat([part for part, some, _ in parts if some]), items, faults, pictures)

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


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
