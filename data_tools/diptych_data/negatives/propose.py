"""All candidates of a shard: a file of them, written in one step, that outlasts an interruption."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.config import to_tree
from diptych.data import captions
from diptych.data.captions import Captions, clean
from diptych.data.faults import UnusableSample
from diptych.runfolder import write_text
from diptych.seeding import derive, generator
from diptych_data import entries
from diptych_data.entries import Entry, Part
from diptych_data.negatives.candidate import Negative
from diptych_data.negatives.judge import Alike, Judge
from diptych_data.negatives.language.family import Raw
from diptych_data.negatives.lexicon import Lexicon, read_lexicon
from diptych_data.negatives.options import NegativesOptions
from diptych_data.negatives.phrase import Phrase, Tagger, parse
from diptych_data.negatives.positives import paraphrases, sub_captions
from diptych_data.negatives.tagger import load_tagger
from diptych_data.negatives.wordnet import are_related, load_synonyms

Write = Callable[[Sequence[str], int], list[list[Raw]]]
"""Captions and a seed → what a language model makes of each."""
Score = Callable[[Sequence[str]], list[float]]
"""Texts → mean log-likelihood per token."""


@dataclass(frozen=True)
class Models:
    """Language models, loaded."""

    writers: tuple[tuple[str, Write], ...] = ()
    score: Score | None = None


@dataclass
class Proposed:
    """What is known of one sample's texts."""

    number: int
    negatives: list[Negative] = field(default_factory=list)
    positives: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class _Draft:
    """A sample while its candidates are gathered."""

    proposed: Proposed
    sources: list[Phrase]
    truths: list[str]
    raw: list[Negative] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """A shard whose candidates are to be found; travels to the process that does it."""

    shard: str
    number: int
    """Of the shard, which keys its draws."""
    out: Path


def propose(task: Task, options: NegativesOptions, models: Models) -> None:
    """Writes the candidates of a shard."""
    lexicon = read_lexicon(options.lexicon)
    tag = load_tagger() if options.tagger == "textblob" else None
    dropped: Counter[str] = Counter()
    drafts = [
        draft for entry in entries.read(Part(task.shard)) if (draft := _draft(entry, options, lexicon, tag)) is not None
    ]
    for draft in drafts:
        _by_rules(draft, options, task.number)
    _by_models(drafts, models, derive(options.seed, "language", task.number))
    alike = _alike(options, lexicon)
    for draft in drafts:
        _sort_out(draft, lexicon, alike, dropped)
        kept = draft.proposed.negatives
        rng = generator(options.seed, "candidates", task.number, draft.proposed.number)
        draft.proposed.negatives = [
            kept[place] for place in sorted(rng.permutation(len(kept))[: options.max_candidates])
        ]
    if models.score is not None and options.plausible is not None:
        _without_implausible(drafts, models.score, options.plausible.max_drop, dropped)
    write_text(task.out, _dumps([draft.proposed for draft in drafts], dropped))


def check_tools(options: NegativesOptions) -> None:
    """Raises ConfigError where the lexicon, the tagger or WordNet cannot be had."""
    read_lexicon(options.lexicon)
    if options.tagger == "textblob":
        load_tagger()
    if options.synonyms == "wordnet":
        load_synonyms()


def _alike(options: NegativesOptions, lexicon: Lexicon) -> Alike:
    if options.synonyms == "lexicon":
        return lexicon.are_alike
    return lambda one, other: lexicon.are_alike(one, other) or are_related(one, other)


def _draft(entry: Entry, options: NegativesOptions, lexicon: Lexicon, tag: Tagger | None) -> _Draft | None:
    """A readable sample's texts; None for one that is not."""
    if entry.fault:
        return None
    try:
        said = captions.parse(entry.members)
    except UnusableSample:
        return None
    texts = dict.fromkeys(text for name in options.columns for one in said.texts(name) if (text := clean(one)))
    sources = [parse(text, lexicon, tag) for text in texts]
    proposed = Proposed(entry.number)
    makers: dict[str, Callable[[Phrase], list[str]]] = {
        "sub": sub_captions,
        "paraphrase": lambda phrase: paraphrases(phrase, lexicon),
    }
    for name in options.positives:
        proposed.positives[name] = list(dict.fromkeys(text for phrase in sources for text in makers[name](phrase)))
    truths = [*_truths(said, options), *(text for found in proposed.positives.values() for text in found)]
    return _Draft(proposed, sources, truths)


def _truths(said: Captions, options: NegativesOptions) -> list[str]:
    """The texts of all columns but the one of negatives."""
    columns = dict.fromkeys((*said.columns, *options.columns))
    return [text for name in columns if name != options.column for one in said.texts(name) if (text := clean(one))]


def _by_rules(draft: _Draft, options: NegativesOptions, shard: int) -> None:
    for place, rule in enumerate(options.rules):
        rng = generator(options.seed, "rule", place, shard, draft.proposed.number)
        for phrase in draft.sources:
            for proposal in rule.propose(phrase, rng):
                draft.raw.append(Negative(proposal.text, rule.choice_name, proposal.type, phrase.text))


def _by_models(drafts: Sequence[_Draft], models: Models, seed: int) -> None:
    wanted = [(draft, phrase.text) for draft in drafts for phrase in draft.sources]
    for name, write in models.writers if wanted else ():
        for (draft, text), found in zip(wanted, write([text for _, text in wanted], seed), strict=True):
            draft.raw += [Negative(clean(raw.text), name, raw.type, text) for raw in found]


def _sort_out(draft: _Draft, lexicon: Lexicon, alike: Alike, dropped: Counter[str]) -> None:
    """Keeps what is a negative, or a new paraphrase; counts the rest by reason."""
    said = [one for one in draft.raw if one.type == "paraphrase"]
    if said:
        known = draft.proposed.positives.setdefault("paraphrase", [])
        for one in said:
            reason = Judge([*draft.truths, one.of], lexicon, _exactly).reason(one.text, one.of)
            if reason in ("", "synonymous", "mentioned"):
                known.append(one.text)
                draft.truths.append(one.text)
            else:
                dropped[reason] += 1
    judge = Judge(draft.truths, lexicon, alike)
    for one in draft.raw:
        if one.type != "paraphrase":
            if reason := judge.reason(one.text, one.of):
                dropped[reason] += 1
            else:
                draft.proposed.negatives.append(one)


def _exactly(one: str, other: str) -> bool:
    return one == other


def _without_implausible(drafts: Sequence[_Draft], score: Score, max_drop: float, dropped: Counter[str]) -> None:
    texts = sorted({text for draft in drafts for one in draft.proposed.negatives for text in (one.text, one.of)})
    scores = dict(zip(texts, score(texts), strict=True))
    for draft in drafts:
        before = draft.proposed.negatives
        draft.proposed.negatives = [one for one in before if scores[one.of] - scores[one.text] <= max_drop]
        dropped["implausible"] += len(before) - len(draft.proposed.negatives)


# --- the file ------------------------------------------------------------------------------------------------------


def _dumps(samples: Sequence[Proposed], dropped: Counter[str]) -> str:
    rows = [[one.number, [[n.text, n.how, n.type, n.of] for n in one.negatives], one.positives] for one in samples]
    counts = {reason: count for reason, count in sorted(dropped.items()) if count}
    return json.dumps({"dropped": counts, "samples": rows}, ensure_ascii=False)


def read_proposed(path: Path) -> Iterator[Proposed]:
    """The samples of a file, in the shard's order."""
    for number, negatives, positives in _document(path)["samples"]:
        yield Proposed(number, [Negative(*one) for one in negatives], positives)


def read_dropped(path: Path) -> Counter[str]:
    """Reason → proposals that came to nothing."""
    return Counter(_document(path)["dropped"])


def _document(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def settings(options: NegativesOptions) -> dict[str, Any]:
    """The options that decide what is written."""
    return {name: value for name, value in to_tree(options).items() if name not in ("out", "workers", "overwrite")}
