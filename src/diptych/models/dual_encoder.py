"""Two towers, one hinge: the model that everything else trains, measures and exports."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from diptych import names
from diptych.config import Config, discover
from diptych.distributed import sharding
from diptych.errors import ConfigError
from diptych.models.adapters.family import Adapter
from diptych.models.captions import next_words
from diptych.models.matching import DecoderTexts, MatchHead
from diptych.models.prompts.family import ClassPrompts, ClassReading
from diptych.models.towers.family import BuiltTowers, TextTokenizer, Towers
from diptych.seeding import derive
from diptych.vocabulary import IGNORED, TokenLoss

for _package in ("towers", "adapters", "prompts"):
    discover(f"diptych.models.{_package}")

MAX_LOGIT_SCALE = math.log(100.0)


def _default_towers() -> Towers:
    return Towers.named("open_clip")(name="ViT-B-32")  # type: ignore[call-arg]


@dataclass(frozen=True)
class ModelConfig(Config):
    """A dual encoder."""

    towers: Towers = field(default_factory=_default_towers)
    """Where the image tower and the text tower come from."""
    init_temperature: float = 0.07
    """Softmax temperature at the start; logit_scale = ln(1 / temperature). Ignored when weights bring their own."""
    logit_bias: float | None = None
    """Start value of a learned bias on the logits (SigLIP uses -10); none: no bias but one that weights bring."""
    matching: bool = False
    """Whether a captioner gets a head that says if a caption belongs to a picture, for the objective's term `matching`
    (ALBEF, arXiv:2107.07651)."""
    frozen: tuple[str, ...] = ()
    """Beginnings of the names of parameters that are not trained: `[image_tower]` is locked-image tuning
    (arXiv:2111.07991), `[image_tower.transformer.resblocks.0]` keeps a layer."""
    adapters: tuple[Adapter, ...] = ()
    """What is added to the model and learns in its place: with any, the model's own parameters are not trained."""
    unfrozen: tuple[str, ...] = ()
    """Beginnings of the names of parameters that learn beside the adapters, such as `logit_scale`."""

    def __post_init__(self) -> None:
        if not 0.01 <= self.init_temperature <= 1.0:
            raise ValueError(f"init_temperature must lie in [0.01, 1], not {self.init_temperature}")
        if self.unfrozen and not self.adapters:
            raise ValueError("unfrozen names what learns beside adapters, and there are none; see frozen")


class Embeddings(NamedTuple):
    """What a forward pass gives the objective."""

    image_features: Float[Tensor, "B D"]
    """Unit norm."""
    text_features: Float[Tensor, "B D"]
    """Unit norm."""
    logit_scale: Float[Tensor, ""]
    """Multiplies cosines: already exponentiated."""
    logit_bias: Float[Tensor, ""] | None
    hard_captions: Float[Tensor, "B K D"] | None = None
    """Unit norm; where hard captions were given."""
    caption_losses: Float[Tensor, " B"] | None = None
    """Summed over the words of each caption; where a captioner was asked for them."""
    caption_lengths: Int[Tensor, " B"] | None = None
    """How many words that were, the end of the text included."""
    match_right: Float[Tensor, " B"] | None = None
    """Logits of the pairs belonging together, and"""
    match_wrong: Float[Tensor, " M"] | None = None
    """of the wrong pairs; where these were given."""
    class_logits: Float[Tensor, "B C"] | None = None
    """Of each picture and class; where the model has prompts of classes and labels were given."""
    prompt_losses: Float[Tensor, " B"] | None = None
    """What the prompts ask for beside the right class; where they do."""


class DualEncoder(nn.Module):
    """An image tower and a text tower that meet in one space, with a learned logit scale (and, if asked, bias)."""

    def __init__(self, built: BuiltTowers, config: ModelConfig) -> None:
        super().__init__()
        self.image_tower = built.image_tower
        self.text_tower = built.text_tower
        self.text_decoder = built.captioner.decoder if built.captioner is not None else None
        """What makes this a captioner; the towers then give tokens beside features."""
        self.spelling = built.captioner.spelling if built.captioner is not None else None
        self.targets = built.captioner.targets if built.captioner is not None else next_words
        self.match_width = built.captioner.width if built.captioner is not None else None
        self.match_head = self._match_head(built) if config.matching else None
        start = built.logit_scale if built.logit_scale is not None else math.log(1 / config.init_temperature)
        # Vectors of one: parameters without axes cannot be divided among ranks, and FSDP2 and ZeRO refuse them.
        self.logit_scale = nn.Parameter(torch.tensor([start]))
        bias = built.logit_bias if built.logit_bias is not None else config.logit_bias
        self.logit_bias = nn.Parameter(torch.tensor([bias])) if bias is not None else None
        self.embed_dim = built.embed_dim
        self.pixels = built.pixels
        self.image_size = built.pixels.size
        self.tokenizer: TextTokenizer = built.tokenizer
        self.open_clip_config: dict[str, Any] | None = built.open_clip_config
        # Folded: (x / 255 - mean) / std = x * gain + offset, one pass over the pixels.
        mean, std = torch.tensor(built.pixels.mean), torch.tensor(built.pixels.std)
        self.register_buffer("pixel_gain", (1 / (255 * std)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_offset", (-mean / std).view(1, 3, 1, 1), persistent=False)
        self.class_prompts: ClassPrompts | None = None
        """Texts with learned vectors that stand for classes; an adapter's."""
        self.config = config
        self._freeze(config)
        for adapter in config.adapters:
            adapter.apply(self)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ConfigError("no parameter is left to train · model.frozen · leave something out")

    def _match_head(self, built: BuiltTowers) -> nn.Module:
        """Raises ConfigError where nothing sees picture and words together."""
        if built.captioner is None or self.match_width is None:
            raise ConfigError(
                "no decoder sees picture and words together · model.matching · name a captioner, such as "
                "coca_ViT-B-32, in model.towers.name, or give model.towers.multimodal"
            )
        return built.captioner.match_head or MatchHead(self.match_width)

    def _freeze(self, config: ModelConfig) -> None:
        """Raises ConfigError where a prefix is the beginning of no parameter's name."""
        known = [name for name, _ in self.named_parameters()]
        for key in ("frozen", "unfrozen"):
            names.check(getattr(config, key), known, where=f"model.{key}")
        for name, parameter in self.named_parameters():
            kept = any(names.begins(name, prefix) for prefix in config.frozen)
            learns = not config.adapters or any(names.begins(name, prefix) for prefix in config.unfrozen)
            parameter.requires_grad = learns and not kept

    def train(self, mode: bool = True) -> Self:
        """As torch's; a tower without anything to train stays as it is used: no dropout, no running statistics."""
        super().train(mode)
        for tower in (self.image_tower, self.text_tower, self.text_decoder):
            if tower is not None and not _learns(tower):
                tower.eval()
        return self

    def encode_image(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B D"]:
        """Unit-norm float32 features of uint8 pictures; normalisation of the pixels happens here, on the device."""
        return self.see(images)[0]

    def encode_text(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Unit-norm float32 features of token ids."""
        return self.read(tokens)[0]

    def see(
        self, images: UInt8[Tensor, "B 3 height width"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B P W"] | None]:
        """The features of pictures and, of a captioner, their tokens, from one pass."""
        pixels = self.normalised(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and _learns(self.image_tower)):
            features, tokens = _unit(self.image_tower(pixels))
        if self.text_decoder is not None and tokens is None:
            return features, features[:, None]
        return features, tokens

    def normalised(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B 3 height width"]:
        """What the image tower sees of pictures: numbers of about zero mean and unit variance."""
        gain, offset = self.get_buffer("pixel_gain"), self.get_buffer("pixel_offset")
        return torch.addcmul(offset, images.to(gain.dtype), gain).contiguous(memory_format=torch.channels_last)

    def read(self, tokens: Int[Tensor, "B L"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B L W"] | None]:
        """The features of token ids and, of a captioner, what it makes of each of them, from one pass."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _learns(self.text_tower)):
            features, words = _unit(self.text_tower(tokens))
        # A text tower may need padding that is not there; the decoder does not.
        return features, words[:, : tokens.shape[1]] if words is not None else None

    def words(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L W"]:
        """What the decoder of a captioner takes of token ids; where that is less than the text tower makes of them, it
        has a `words` of its own."""
        if hasattr(self.text_tower, "words"):
            return self.text_tower.words(tokens)  # type: ignore[operator]
        _, words = self.read(tokens)
        assert words is not None, "the caller sees to it that the model writes captions"
        return words

    def next_word_logits(
        self, images: UInt8[Tensor, "B 3 height width"], tokens: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B foretold V"]:
        """Logits of the words of `targets`, of a captioner: of all but the first (CoCa), or of all (a language model).
        All of them at once: for tests, and for captions that are compared word by word."""
        assert self.text_decoder is not None, "the caller sees to it that the model writes captions"
        _, image_tokens = self.see(images)
        return self.text_decoder(image_tokens, self.words(tokens)[:, :-1])

    def match(
        self, image_tokens: Float[Tensor, "B P W"], words: Float[Tensor, "B L W"], tokens: Int[Tensor, "B L"]
    ) -> Float[Tensor, " B"]:
        """Logits of captions belonging to pictures, of their tokens and what the text tower makes of these."""
        assert self.match_head is not None, "the caller sees to it that the model has a matching head"
        decoder: Any = self.text_decoder
        logits: Tensor = self.match_head(decoder.hidden(image_tokens, words), tokens)
        return logits

    def forward(
        self,
        images: UInt8[Tensor, "B 3 height width"],
        tokens: Int[Tensor, "B L"],
        hard_tokens: Int[Tensor, "B K L"] | None = None,
        caption: TokenLoss | None = None,
        labels: Int[Tensor, " B"] | None = None,
        further: DecoderTexts = DecoderTexts(),  # noqa: B008 - immutable
    ) -> Embeddings:
        """Both towers and the scale: everything an objective needs, in one call that wrappers can see.

        Args:
            hard_tokens: those of K hard captions of each picture, K above 0, embedded together with the others.
            caption: asks a captioner for the losses of its captions, made in this way.
            labels: the classes of the pictures; a model with prompts of classes reads these in place of the captions.
            further: other texts for a captioner's decoder.
        """
        image_features, image_tokens = self.see(images)
        # Sums of one number: FSDP2 does not like views among what a module gives back.
        scale = self.logit_scale.exp().sum()
        bias = self.logit_bias.sum() if self.logit_bias is not None else None
        if self.class_prompts is not None and labels is not None:
            return self._among_classes(image_features, labels, scale, bias)
        count = len(tokens)
        both = tokens if hard_tokens is None else torch.cat([tokens, hard_tokens.flatten(0, 1)])
        text_features, words = self.read(both)
        hard = text_features[count:].unflatten(0, hard_tokens.shape[:2]) if hard_tokens is not None else None
        features = text_features[:count] if hard_tokens is not None else text_features
        found = Embeddings(image_features, features, scale, bias, hard)
        if self.text_decoder is None or image_tokens is None or words is None:
            return found
        if (wrong := further.wrong) is not None:
            found = found._replace(
                match_right=self.match(image_tokens, words[:count], tokens),
                match_wrong=self.match(image_tokens[wrong.images], self.words(wrong.tokens), wrong.tokens),
            )
        if caption is not None:
            words = words[:count]
            if further.captions is not None:
                tokens, words = further.captions, self.words(further.captions)
            targets = self.targets(tokens)
            losses = self.text_decoder(image_tokens[: len(tokens)], words[:, :-1], targets, caption)
            found = found._replace(caption_losses=losses, caption_lengths=(targets != IGNORED).sum(1))
        return found

    def _among_classes(
        self, image_features: Float[Tensor, "B D"], labels: Int[Tensor, " B"], scale: Tensor, bias: Tensor | None
    ) -> Embeddings:
        """Pictures and the texts of their classes, with the logits of all classes."""
        found = self.read_classes(image_features)
        with torch.autocast(image_features.device.type, enabled=False):
            logits = found.logits(scale)
        rows = torch.arange(len(labels), device=labels.device)
        texts = found.features[labels] if found.features.ndim == 2 else found.features[rows, labels]
        asked = found.losses[rows, labels] if found.losses is not None else None
        return Embeddings(found.image_features, texts, scale, bias, class_logits=logits, prompt_losses=asked)

    def read_classes(self, image_features: Float[Tensor, "B D"], names: Sequence[str] | None = None) -> ClassReading:
        """What classes are to some pictures, by the model's prompts.

        Args:
            names: of the classes; none: those that the prompts learn from.

        Raises:
            ConfigError: the prompts cannot read others than they learned from.
        """
        assert self.class_prompts is not None, "the caller sees to it that the model has prompts of classes"
        return self.class_prompts.read(self, image_features, names if names is not None else self.class_prompts.names)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keeps the scale at or below 100, as CLIP does (arXiv:2103.00020, section 2.5). After every optimizer step."""
        for part in sharding.held(self.logit_scale):
            part.clamp_(max=MAX_LOGIT_SCALE)


def _unit(found: Any) -> tuple[Float[Tensor, "B D"], Tensor | None]:
    """Features of unit norm, and the tokens beside them where a tower gives some."""
    features, tokens = found if isinstance(found, tuple) else (found, None)
    return F.normalize(features.float(), dim=-1), tokens


def _learns(tower: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in tower.parameters())


def count(model: nn.Module) -> tuple[int, int]:
    """Parameters in all, and those that are trained."""
    found = list(model.parameters())
    return sum(p.numel() for p in found), sum(p.numel() for p in found if p.requires_grad)


def build(config: ModelConfig, *, seed: int) -> DualEncoder:
    """The model with weights drawn from `seed` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "model"))
        return DualEncoder(config.towers.build(), config)
