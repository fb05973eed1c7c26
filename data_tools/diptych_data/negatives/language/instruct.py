"""A language model that follows instructions is asked for false captions and for paraphrases."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from diptych.errors import ConfigError, one_line
from diptych_data.negatives.language.family import Raw, Writer
from diptych_data.negatives.language.pretrained import causal_or_seq2seq, load_model

_NUMBERING = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+")
_QUOTES = "\"'“”‘’`"
_MAX_LINE = 4000


@dataclass(frozen=True)
class Instruct(Writer, name="instruct"):
    """One prompt for each type; of the answer the first line counts, without quotes and numbering."""

    model: str
    """Folder or hub name of a causal or sequence-to-sequence model; a chat template is used where it has one."""
    prompts: Path | None = None
    """YAML: type → prompt with `{caption}`; `paraphrase` asks for true ones. None: `prompts.yaml` of this package."""
    per_type: int = 1
    """Answers to each prompt; above 1 they are sampled."""
    temperature: float = 0.8
    """Of sampling."""
    max_new_tokens: int = 48
    """Of an answer."""
    batch: int = 16
    """Prompts answered at once."""
    device: str = "cpu"
    """Where the model runs."""

    def __post_init__(self) -> None:
        if min(self.per_type, self.max_new_tokens, self.batch) < 1 or not 0 < self.temperature < 10:
            raise ValueError("per_type, max_new_tokens and batch must be at least 1, temperature in (0, 10)")

    def load(self) -> Callable[[Sequence[str], int], list[list[Raw]]]:
        """The loaded model. Sampling is keyed by the seed, and leaves torch's own generators as they were."""
        prompts = read_prompts(self.prompts)
        head = causal_or_seq2seq(self.model)
        tokenizer, model = load_model(self.model, head, self.device)
        tokenizer.padding_side = "left"

        def write(captions: Sequence[str], seed: int) -> list[list[Raw]]:
            found: list[list[Raw]] = [[] for _ in captions]
            jobs = [
                (n, type, text.replace("{caption}", c))
                for n, c in enumerate(captions)
                for type, text in prompts.items()
            ]
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                for first in range(0, len(jobs), self.batch):
                    some = jobs[first : first + self.batch]
                    answers = self._answers(tokenizer, model, [prompt for *_, prompt in some], cut=head == "causal")
                    for place, answer in enumerate(answers):
                        number, type, _ = some[place // self.per_type]
                        found[number].append(Raw(first_line(answer), type))
            return found

        return write

    @torch.inference_mode()
    def _answers(self, tokenizer: Any, model: Any, prompts: Sequence[str], *, cut: bool) -> list[str]:
        texts = [_as_chat(tokenizer, prompt) for prompt in prompts]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True).to(model.device)
        inputs.pop("token_type_ids", None)
        sampled = {"do_sample": True, "temperature": self.temperature} if self.per_type > 1 else {"do_sample": False}
        out = model.generate(
            **inputs,
            **sampled,
            max_new_tokens=self.max_new_tokens,
            num_return_sequences=self.per_type,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = out[:, inputs["input_ids"].shape[1] :] if cut else out
        return tokenizer.batch_decode(answers, skip_special_tokens=True)


def _as_chat(tokenizer: Any, prompt: str) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def first_line(answer: str) -> str:
    """The first line that says something, without numbering and the quotes around it."""
    for line in answer[:_MAX_LINE].splitlines():
        text = _NUMBERING.sub("", line).strip()
        text = text.strip(_QUOTES).strip() if text[:1] in _QUOTES else text
        if text:
            return text
    return ""


def read_prompts(path: Path | None) -> dict[str, str]:
    """Type → prompt.

    Raises:
        ConfigError: the file is no such map, or a prompt has no `{caption}`.
    """
    try:
        built_in = resources.files("diptych_data.negatives.language") / "prompts.yaml"
        text = built_in.read_text(encoding="utf-8") if path is None else path.read_text(encoding="utf-8")
        prompts = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"prompts not readable as YAML ({one_line(error, None)}) · {path}") from error
    if not isinstance(prompts, dict) or not prompts:
        raise ConfigError(f"prompts are no map of type to prompt · {path} · write object: … {{caption}} …")
    for type, prompt in prompts.items():
        if not isinstance(type, str) or not isinstance(prompt, str) or "{caption}" not in prompt:
            raise ConfigError(f"prompt of {type!r} has no {{caption}} · {path} · say where the caption goes")
    return prompts
