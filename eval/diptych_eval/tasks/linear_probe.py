"""Linear probe: a linear classifier learned on frozen features of one part, measured on another.

Protocol: multinomial logistic regression on unit-norm features with an L2 penalty (arXiv:2103.00020, appendix A.3), at
its optimum (L-BFGS, `diptych_eval.probe`). The strength is chosen on a part of the training pictures, which is held out
for that, and the classifier then learned from all of them. The test pictures choose nothing. Equal scores count
against the model.

clip-benchmark's linear probe is another protocol, whose figures are not these: ten epochs of AdamW in random batches
from a random start, which ends far from the optimum, so that the end itself acts as a penalty; its seeds differ by more
than rounding, and its data's order is not of the seed alone.
"""

from dataclasses import dataclass

from diptych_eval.embedder import Embedder
from diptych_eval.labelled import LabelledTask, judged
from diptych_eval.probe import Problem, choose_strength
from diptych_eval.tasks.family import Outcome


@dataclass(frozen=True)
class LinearProbe(LabelledTask, name="linear_probe"):
    """Linear probe."""

    strength: float | None = None
    """Of the penalty, greater than 0; none: chosen on pictures held out."""
    held_out: float = 0.2
    """Share of each class's training pictures on which strength is chosen, in (0, 1)."""
    seed: int = 0
    """Says which they are."""

    def __post_init__(self) -> None:
        if self.strength is not None and self.strength <= 0:
            raise ValueError(f"strength must be greater than 0, not {self.strength}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie in (0, 1), not {self.held_out}")

    def run(self, embedder: Embedder) -> Outcome:
        """See Task. Raises DataError for labels that do not fit, or where there is nothing to hold out."""
        train, test = self.embed(embedder)
        notes: dict[str, object] = {"num_training": len(train), "num_candidates": len(train.classes)}
        strength, start = self.strength, None
        if strength is None:
            chosen = choose_strength(train, share=self.held_out, seed=self.seed)
            strength, start = chosen.strength, chosen.model
            notes["held_out_top1"] = chosen.top1
        model = Problem(train).solve(strength, start)
        figures, items = judged(test, model.ranks(test))
        notes |= {"chosen_strength": strength, "steps": model.steps, "slope": model.slope}
        return Outcome(figures, len(test), (items,), notes=notes)
