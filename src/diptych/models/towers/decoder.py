"""What writes captions: CoCa's multimodal half, which sees the words before and the picture.

    text tower                 word → word, each sees those before it; the class token behind them gives the feature
    decoder, layer by layer    words see the words before them, then the tokens of the picture
    vocabulary                 what the decoder makes of the words up to t → logits of word t + 1

The modules are open_clip's (`MultimodalTransformer`), and so are the names of the weights. Source: arXiv:2205.01917.
"""

from typing import Any

from jaxtyping import Float, Int
from open_clip.coca_model import MultimodalCfg
from open_clip.transformer import LayerNorm, MultimodalTransformer, QuickGELU, TextTransformer, VisionTransformer
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.vocabulary import TokenLoss, token_losses


class CaptionDecoder(MultimodalTransformer):
    """open_clip's, which never gives the logits of a whole batch unless asked, and whose new weights are drawn."""

    def __init__(self, multimodal_cfg: dict[str, Any], *, vocab_size: int, quick_gelu: bool) -> None:
        config = MultimodalCfg(**multimodal_cfg)
        super().__init__(
            context_length=config.context_length,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            ls_init_value=config.ls_init_value,
            output_dim=vocab_size,
            act_layer=QuickGELU if quick_gelu else nn.GELU,
            norm_layer=LayerNorm,
        )
        self.init_parameters()

    def init_parameters(self) -> None:
        """As in open_clip's text tower; open_clip leaves the vocabulary's matrix to chance."""
        residual = self.width**-0.5 * (2 * self.layers) ** -0.5
        for block in (*self.resblocks, *self.cross_attn):
            nn.init.normal_(block.attn.in_proj_weight, std=self.width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * self.width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual)
        nn.init.normal_(self.text_projection, std=self.width**-0.5)

    def hidden(self, image_tokens: Float[Tensor, "B P W"], words: Float[Tensor, "B L W"]) -> Float[Tensor, "B L W"]:
        """What the vocabulary's matrix is applied to."""
        length = words.shape[1]
        mask = self.attn_mask[:length, :length]
        for block, cross in zip(self.resblocks, self.cross_attn, strict=True):
            words = cross(block(words, attn_mask=mask), k_x=image_tokens, v_x=image_tokens)
        return self.ln_final(words)

    def forward(
        self,
        image_tokens: Float[Tensor, "B P W"],
        words: Float[Tensor, "B L W"],
        targets: Int[Tensor, "B L"] | None = None,
        form: TokenLoss | None = None,
    ) -> Tensor:
        """Logits [B, L, V]; or, where the next words are given, the loss of each caption [B], summed over its words.

        All of it within `forward`, where wrappers put divided parameters together.
        """
        hidden = self.hidden(image_tokens, words)
        if targets is None or form is None:
            return hidden @ self.text_projection
        losses = token_losses(hidden.flatten(0, 1), self.text_projection, targets.flatten(), form)
        return losses.view(targets.shape).sum(1)


def check_fit(image_tower: nn.Module, text_tower: nn.Module, decoder: CaptionDecoder) -> None:
    """Raises ConfigError unless the decoder can work on what the towers give."""
    if not isinstance(text_tower, TextTransformer) or text_tower.attn_mask is None:
        raise ConfigError(
            "the text tower sees the words that the decoder is to foretell · model.towers · a captioner needs "
            "open_clip's own text tower with its causal mask"
        )
    if not isinstance(image_tower, VisionTransformer):
        raise ConfigError(
            "the image tower gives no tokens · model.towers.vision · a captioner needs open_clip's own vision "
            "transformer"
        )
    tokens = image_tower.output_dim if image_tower.attn_pool is not None else image_tower.transformer.width
    if not tokens == text_tower.width == decoder.width:
        raise ConfigError(
            f"tokens of pictures have {tokens} numbers, words {text_tower.width}, the decoder {decoder.width} · "
            "model.towers.multimodal · give all the same width (with `vision.attentional_pool` pictures' tokens have "
            "embed_dim numbers)"
        )
    if decoder.context_length < text_tower.context_length:
        raise ConfigError(
            f"the decoder takes {decoder.context_length} words, captions have {text_tower.context_length} · "
            "model.towers.multimodal.context_length · give both the same"
        )
