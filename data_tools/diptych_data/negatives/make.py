"""`diptych data negatives`: shards to shards with negatives, in three passes that an interruption does not undo.

1. propose   every shard by itself: candidates by rules and models, what is true after all sorted out
2. refine    once, on drawn pictures: what a text-only classifier recognises
3. write     every shard by itself: the choice, the new tar

Each pass leaves files under `.OUT.work`; the same command goes on behind the last one. The shards are the same for
any number of workers, and however often the work was interrupted.

OUT/
  000000.tar, 000000.tar.index.jsonl   one for each shard of the input, in its order
  negatives.json                       options and summary
"""

import heapq
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

from diptych.data.shards import list_shards
from diptych.errors import DataError
from diptych.runfolder import write_text
from diptych.seeding import derive
from diptych_data import blind, parallel
from diptych_data.negatives import propose, refine, write
from diptych_data.negatives.candidate import Negative
from diptych_data.negatives.guesser import Accuracy
from diptych_data.negatives.images.family import Counterparts
from diptych_data.negatives.options import NegativesOptions
from diptych_data.negatives.propose import Models
from diptych_data.negatives.refine import Refinement
from diptych_data.negatives.select import choose
from diptych_data.packing.workfolder import WorkFolder, opened
from diptych_data.rewrite import require_free

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blind:
    """The blind test of the drawn pictures' negatives, by kind."""

    before: dict[str, Accuracy]
    """Chosen at random."""
    after: dict[str, Accuracy]


@dataclass(frozen=True)
class NegativesSummary:
    """What was written; also in negatives.json."""

    samples: int
    shards: int
    negatives: int
    without: int
    """Samples for which there is no negative."""
    kinds: dict[str, int]
    """Rule and type → negatives."""
    positives: dict[str, int]
    """Column → texts added."""
    images: int
    dropped: dict[str, int]
    """Reason → proposals that came to nothing; `blind`: recognised without the picture."""
    skipped: dict[str, int]
    """Reason → samples that are not in the new shards."""
    blind: Blind | None
    """None: nothing was refined."""
    out: str


def negatives(options: NegativesOptions) -> NegativesSummary:
    """Writes the shards. Interrupted, the same call goes on.

    Raises:
        ConfigError: a model, tagger or lexicon cannot be had.
        DataError: there is nothing to write, or `out` cannot be used. What was there stays.
    """
    shards = list_shards(options.shards)
    out = options.out.resolve()
    WorkFolder(out).restore()
    require_free(out, shards, overwrite=options.overwrite)
    propose.check_tools(options)
    with opened(out, _digest(options, shards)) as folder:
        return _make(folder, options, shards)


def _digest(options: NegativesOptions, shards: Sequence[str]) -> str:
    """Equal where the same shards would be written."""
    parts: list[object] = [propose.settings(options)]
    for name in (*shards, str(options.lexicon or "")):
        path = Path(name)
        known = path.stat() if path.is_file() else None
        parts.append([str(path.resolve()) if known else name, known and [known.st_size, known.st_mtime_ns]])
    return blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


def _make(folder: WorkFolder, options: NegativesOptions, shards: Sequence[str]) -> NegativesSummary:
    try:
        candidates = _propose(folder, options, shards)
        found = _refine(folder, options, candidates)
        tasks = [
            write.Task(
                shard,
                candidates[number],
                folder.work / "refinement.safetensors" if found is not None else None,
                folder.shards / f"{number:06d}.tar",
                folder.outcomes / f"{number:06d}.json",
                number,
            )
            for number, shard in enumerate(shards)
        ]
        _write(tasks, options, options.images.open(shards) if options.images is not None else None)
        summary = _summary(tasks, options, found)
        counts = {name: value for name, value in asdict(summary).items() if name != "out"}
        document = {"format": 1, "options": propose.settings(options), "summary": counts}
        write_text(folder.shards / "negatives.json", json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    except parallel.Killed:
        raise
    except DataError:
        folder.discard()
        raise
    folder.finish()
    return summary


# --- the passes ----------------------------------------------------------------------------------------------------


def _propose(folder: WorkFolder, options: NegativesOptions, shards: Sequence[str]) -> list[Path]:
    place = folder.work / "candidates"
    place.mkdir(exist_ok=True)
    paths = [place / f"{number:06d}.json" for number in range(len(shards))]
    missing = [propose.Task(shards[n], n, path) for n, path in enumerate(paths) if not path.is_file()]
    if len(missing) < len(paths):
        log.info("goes on: candidates of %d of %d shards are complete", len(paths) - len(missing), len(paths))
    models = _models(options) if missing else Models()
    workers = 1 if models.writers or models.score else options.workers
    work = partial(propose.propose, options=options, models=models)
    for _ in parallel.each(work, missing, title="proposing", workers=workers):
        pass
    return paths


def _models(options: NegativesOptions) -> Models:
    writers = tuple((writer.choice_name, writer.load()) for writer in options.language)
    return Models(writers, options.plausible.load() if options.plausible is not None else None)


def _refine(folder: WorkFolder, options: NegativesOptions, candidates: Sequence[Path]) -> Blind | None:
    """Learns the refinement once, and says what it does."""
    if options.refine is None:
        return None
    learned, report = folder.work / "refinement.safetensors", folder.work / "blind.json"
    if not report.is_file():
        pictures = _drawn(candidates, options.refine.max_pictures, options.seed)
        refinement = refine.learn(pictures, options.refine, per_picture=options.per_picture, seed=options.seed)
        refine.save(refinement, learned)
        before, after = (_tested(pictures, one, options) for one in (Refinement(), refinement))
        write_text(report, json.dumps(asdict(Blind(before, after))))
    stages = json.loads(report.read_text(encoding="utf-8"))
    return Blind(**{name: {kind: Accuracy(**one) for kind, one in found.items()} for name, found in stages.items()})


def _tested(
    pictures: Sequence[tuple[int, Sequence[Negative]]], refinement: Refinement, options: NegativesOptions
) -> dict[str, Accuracy]:
    taken: Counter[str] = Counter()
    chosen: list[Negative] = []
    for number, found in pictures:
        keys = refinement.keys(found, seed=options.seed, number=number)
        chosen += choose(found, keys, options.per_picture, taken)
    return blind.measure(chosen, max_pairs=20000, seed=options.seed)


def _drawn(candidates: Sequence[Path], count: int, seed: int) -> list[tuple[int, Sequence[Negative]]]:
    """Pictures with candidates, drawn by keys of their own: the same for any order of reading."""

    def keyed() -> Iterator[tuple[int, int, int, list[Negative]]]:
        for shard, path in enumerate(candidates):
            for one in propose.read_proposed(path):
                if one.negatives:
                    yield derive(seed, "refine", shard, one.number), shard, one.number, one.negatives

    drawn = heapq.nsmallest(count, keyed(), key=lambda row: row[:3])
    return [(number, found) for _, shard, number, found in sorted(drawn, key=lambda row: row[1:3])]


def _write(tasks: Sequence[write.Task], options: NegativesOptions, counterparts: Counterparts | None) -> None:
    missing = [task for task in tasks if not write.finished(task)]
    if len(missing) < len(tasks):
        log.info("goes on: %d of %d shards are complete", len(tasks) - len(missing), len(tasks))
    work = partial(write.write, options=options, counterparts=counterparts)
    for _ in parallel.each(work, missing, title="writing", workers=options.workers):
        pass


def _summary(tasks: Sequence[write.Task], options: NegativesOptions, found: Blind | None) -> NegativesSummary:
    kinds, positives, skipped, dropped = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    outcomes = [write.read_outcome(task.outcome) for task in tasks]
    for task, outcome in zip(tasks, outcomes, strict=True):
        kinds.update(outcome.kinds)
        positives.update(outcome.positives)
        skipped.update(outcome.skipped)
        dropped.update(propose.read_dropped(task.proposed))
        dropped["blind"] += outcome.refused
    samples = sum(outcome.samples for outcome in outcomes)
    if not samples:
        raise DataError(
            f"no sample to write ({_listed(skipped) or 'none there'}) · {options.shards} · choose others; nothing was "
            "changed"
        )
    ordered = (dict(sorted(counter.items())) for counter in (kinds, positives, +dropped, skipped))
    kind_counts, positive_counts, dropped_counts, skipped_counts = ordered
    return NegativesSummary(
        samples=samples,
        shards=len(tasks),
        negatives=kinds.total(),
        without=sum(outcome.without for outcome in outcomes),
        kinds=kind_counts,
        positives=positive_counts,
        images=sum(outcome.images for outcome in outcomes),
        dropped=dropped_counts,
        skipped=skipped_counts,
        blind=found,
        out=str(options.out),
    )


def _listed(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counter.items())
