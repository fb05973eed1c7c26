"""A causal language model of transformers that reads captions, beside an image tower from anywhere.

A caption's feature is what the model makes of the end-of-text token behind it, through a linear projection. Behind a
causal mask padding to the right changes nothing. Ids travel one higher than they are, as in hf.py: 0 is padding in a
batch, and a word to the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.errors import CheckpointError, ConfigError, one_line
from diptych.models.towers.family import BuiltTowers, CachedTokenizer, Towers, padded_with
from diptych.models.towers.hf import refusing
from diptych.models.towers.prefix import captioner

_LONGEST = 1 << 16


@dataclass(frozen=True)
class LanguageModelTowers(Towers, name="language_model"):
    """A large language model as text tower (VladVA, arXiv:2412.04378): long captions, many languages, world knowledge.
    Tune it with LoRA, the projection in `model.unfrozen` (`text_tower.projection`)."""

    image: Towers
    """Whose image tower it is; pixels are prepared as it wants them, and features are as wide as its own."""
    name: str
    """A causal language model on the hub, or a folder that transformers wrote, with its tokenizer. Code that a
    repository brings is not run."""
    weights: Literal["published", "random"] = "published"
    """`published`: those that lie with the configuration, from safetensors files; `random`: new ones."""
    context_length: int = 77
    """Tokens of a caption, template and end included; longer ones are cut before the end."""
    template: str = "{}"
    """What the model reads, with `{}` where the caption stands, such as `{} Summarise that in one word:`. What is too
    long is cut at its end, template included."""
    prefix_tokens: int = 0
    """Above 0 the model also foretells each word of a caption, with the term `caption` of the objective: behind this
    many soft tokens, which `text_decoder.prefix` makes from the picture's feature. Features of texts see no picture.
    Such a model writes captions; they end where it foretells what stands behind each: the end of the text, or the
    template's first token behind `{}`, which no caption has then."""

    def __post_init__(self) -> None:
        if "{}" not in self.template:
            raise ValueError(f"template {self.template!r} has no {{}} for the caption")
        if self.context_length < 2:
            raise ValueError(f"context_length must be at least 2, not {self.context_length}")
        if self.prefix_tokens < 0:
            raise ValueError(f"prefix_tokens must be at least 0, not {self.prefix_tokens}")

    def build(self) -> BuiltTowers:
        """See Towers. Raises ConfigError for what is no causal language model, CheckpointError for unusable weights."""
        from transformers import AutoConfig, AutoTokenizer

        image = self.image.build()
        if getattr(
            image.image_tower, "output_tokens", False
        ):  # a captioner's: here there is no decoder that takes them
            image.image_tower.output_tokens = False  # type: ignore[assignment]  # a plain attribute
        with refusing(f"transformers cannot open {self.name!r}"):
            config = AutoConfig.from_pretrained(self.name, trust_remote_code=False)
            theirs = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
        self._check(config, theirs)
        encode = _encoder(theirs, self.template, self.context_length)
        tokenizer = CachedTokenizer(encode, self.context_length, lambda ids: str(theirs.decode(list(ids))))
        model: Any = self._model(config)
        tower = LastToken(
            model.base_model if self.prefix_tokens else model, theirs.eos_token_id, config.hidden_size, image.embed_dim
        )
        writes = None
        if self.prefix_tokens:
            tower.output_tokens = True
            with refusing(f"transformers' {config.model_type!r} foretells no words"):
                writes = captioner(model, tokenizer, theirs, embed_dim=image.embed_dim, num_tokens=self.prefix_tokens)
        return BuiltTowers(
            image_tower=image.image_tower,
            text_tower=tower,
            tokenizer=tokenizer,
            embed_dim=image.embed_dim,
            pixels=image.pixels,
            logit_scale=None,
            logit_bias=None,
            open_clip_config=None,
            captioner=writes,
        )

    def _check(self, config: Any, theirs: Any) -> None:
        """Raises ConfigError for other kinds of models, for a tokenizer that ends no text, and for texts that are too
        long."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if not known or getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
            raise ConfigError(
                f"{config.model_type!r} is no causal language model · {self.name} · name one such as GPT-2, Llama, Qwen"
            )
        if config.model_type in ("bert", "roberta", "xlm-roberta", "electra") and not config.is_decoder:
            raise ConfigError(f"{config.model_type!r} sees what follows, it is no causal language model · {self.name}")
        if theirs.eos_token_id is None:
            raise ConfigError(f"the tokenizer has no end-of-text token · {self.name} · give its files an eos_token")
        limit = getattr(config, "max_position_embeddings", None) or _LONGEST
        if self.context_length + self.prefix_tokens > limit:
            behind = f" behind {self.prefix_tokens} of the picture" if self.prefix_tokens else ""
            raise ConfigError(
                f"captions cannot have {self.context_length} tokens{behind}, at most {limit - self.prefix_tokens} · "
                "model.towers.context_length"
            )

    def _model(self, config: Any) -> nn.Module:
        """In float32; with its head only where it is to foretell words."""
        from transformers import AutoModel, AutoModelForCausalLM

        kind: Any = AutoModelForCausalLM if self.prefix_tokens else AutoModel
        if self.weights == "random":
            with refusing(f"transformers cannot build {self.name!r}"):
                found: nn.Module = kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
                return found
        try:
            model, report = kind.from_pretrained(
                self.name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except Exception as error:  # whatever a damaged or foreign file makes of the readers
            raise CheckpointError(f"weights do not fit the model ({one_line(error)}) · {self.name}") from error
        if absent := sorted(report["missing_keys"]):
            raise CheckpointError(f"{len(absent)} weights are absent, {absent[0]} the first · {self.name}")
        whole: nn.Module = model
        return whole


class LastToken(nn.Module):
    """What a language model makes of the last token of each text."""

    def __init__(self, model: nn.Module, end: int, width: int, embed_dim: int) -> None:
        super().__init__()
        self.model = model
        self.end = end
        self.projection = nn.Linear(width, embed_dim, bias=False)
        self.output_tokens = False

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"] | tuple[Tensor, Tensor]:
        """Projected features, not normalised, of ids that are one higher than the model's; with `output_tokens` the
        embeddings of the words [B, L, W] besides."""
        mask = tokens != 0
        ids = padded_with(tokens, self.end)
        states = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        last = mask.sum(1) - 1
        found: Tensor = self.projection(states[torch.arange(len(states), device=states.device), last])
        return (found, self.words(tokens)) if self.output_tokens else found

    def words(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L W"]:
        """The embeddings of the words."""
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        found: Tensor = embeddings(padded_with(tokens, self.end))
        return found


def _encoder(theirs: Any, template: str, length: int) -> Callable[..., Int[Tensor, "B L"]]:
    ends = theirs("a").input_ids[-1] == theirs.eos_token_id  # a text without words may be an end that is a start too

    def encode(texts: Sequence[str], context_length: int = length) -> Int[Tensor, "B L"]:
        found = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(found, texts, strict=True):
            ids = theirs(template.replace("{}", text), truncation=True, max_length=context_length - 1).input_ids
            ids = [*(ids[:-1] if ends else ids), theirs.eos_token_id]
            row[: len(ids)] = torch.tensor(ids) + 1
        return found

    return encode
