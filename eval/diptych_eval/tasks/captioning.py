"""Captioning: what a model writes about pictures, against all that people wrote about each.

cider          CIDEr-D, mean over pictures: what papers call CIDEr, and often write times 100
bleu_1 … 4     of the whole set
rouge_l        mean over pictures

Words and figures are those of COCO's caption evaluation (`diptych_eval.caption_words`, `diptych_eval.caption_scores`).
Intervals are of pictures drawn with replacement, what CIDEr's n-grams weigh left as it is. Sampled captions depend on
the seed and on a picture's place in the set.
"""

from dataclasses import dataclass, field

from diptych.generate import GenerateConfig
from diptych_eval import caption_scores, metrics
from diptych_eval.caption_words import words
from diptych_eval.captioned import CaptionedTask
from diptych_eval.embedder import Embedder
from diptych_eval.tasks.family import Descriptions, Items, Outcome


@dataclass(frozen=True)
class Captioning(CaptionedTask, name="captioning"):
    """Captions by a model that writes them (CoCa, a language model with `prefix_tokens`), over shards or over pictures
    that an annotation file names."""

    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """How they are written."""

    def run(self, embedder: Embedder) -> Outcome:
        """See Task. Raises DataError for a model that writes none, and for a picture without references."""
        found = embedder.captions(self.pictures, self.generate)
        texts = self.captions_of(found.items)
        written = [words(text) for text in found.captions]
        references = [[words(text) for text in some] for some in texts]
        columns = {
            "cider": caption_scores.cider(written, references),
            "rouge_l": caption_scores.rouge_l(written, references),
        }
        figures = {"cider": float(columns["cider"].mean())}
        counts = caption_scores.bleu_counts(written, references)
        of_set = caption_scores.bleu(counts.sum(0))
        of_draws = caption_scores.bleu(metrics.bootstrap_sums(counts))
        intervals = {}
        for place, order in enumerate(caption_scores.ORDERS):
            figures[f"bleu_{order}"] = float(of_set[place])
            intervals[f"bleu_{order}"] = metrics.percentiles(of_draws[:, place])
        figures["rouge_l"] = float(columns["rouge_l"].mean())
        keys = tuple(item.key for item in found.items)
        return Outcome(
            figures,
            len(found),
            (Items("pictures", keys, columns, texts={"caption": found.captions}),),
            descriptions=Descriptions(found, tuple(texts), columns["cider"]),
            intervals=intervals,
            notes={"num_references": sum(map(len, texts))},
        )
