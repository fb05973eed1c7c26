"""Another word of the same category."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from diptych_data.negatives.phrase import Phrase, replaced
from diptych_data.negatives.rules.family import Proposal, Rule, drawn


@dataclass(frozen=True)
class Replace(Rule, name="replace"):
    """A word gives way to another of its category that is no synonym: fox → owl, red → blue, left → right.

    Source: SugarCrepe's replace (arXiv:2306.14610), with words from a lexicon in place of a language model.
    """

    per_slot: int = 6
    """Words tried in the place of one."""

    def propose(self, phrase: Phrase, rng: np.random.Generator) -> Iterator[Proposal]:
        """Each known word in turn."""
        for slot in phrase.slots:
            word, category = slot.meaning.word, slot.meaning.category
            others = [other for other in category.words if not phrase.lexicon.are_alike(word, other)]
            for other in drawn(others, self.per_slot, rng):
                text = replaced(phrase, slot, other)
                if text is not None:
                    yield Proposal(text, slot.type)
