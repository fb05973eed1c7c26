"""How likely a language model finds a text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diptych.config import Config
from diptych_data.negatives.language.pretrained import load_model


@dataclass(frozen=True)
class PlausibleConfig(Config):
    """Which negatives are too odd to be read."""

    model: str
    """Folder or hub name of a causal language model."""
    max_drop: float = 1.0
    """Nats per token by which a negative may be less likely than its caption."""
    batch: int = 64
    """Texts in one forward pass."""
    device: str = "cpu"
    """Where the model runs."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, not {self.batch}")

    def load(self) -> Callable[[Sequence[str]], list[float]]:
        """Texts → mean log-likelihood of their tokens; a text of one token has 0."""
        tokenizer, model = load_model(self.model, "causal", self.device)
        tokenizer.padding_side = "right"
        start = tokenizer.bos_token or tokenizer.eos_token or ""

        @torch.inference_mode()
        def score(texts: Sequence[str]) -> list[float]:
            found: list[float] = []
            for first in range(0, len(texts), self.batch):
                some = [start + text for text in texts[first : first + self.batch]]
                inputs = tokenizer(some, return_tensors="pt", padding=True, truncation=True).to(model.device)
                inputs.pop("token_type_ids", None)
                logits = model(**inputs).logits[:, :-1].float()
                ids, used = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].float()
                likely = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
                found += ((likely * used).sum(1) / used.sum(1).clamp(min=1)).tolist()
            return [round(value, 6) for value in found]

        return score
