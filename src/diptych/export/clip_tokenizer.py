"""open_clip's tokenizer as files of transformers: the vocabulary that open_clip ships, and its cleaning of captions.

FOLDER/
  tokenizer.json, tokenizer_config.json   what AutoTokenizer and AutoProcessor open: the same ids
  vocab.json, merges.txt                  what CLIPTokenizer opens: the same vocabulary, less cleaning

Captions are cleaned there by Python (ftfy, html.unescape) and here by a list of replacements: curly quotes, ligatures,
full-width letters, control characters, the five common HTML entities. Texts in a wrong encoding are not repaired.
"""

import json
import unicodedata
from pathlib import Path
from typing import Any

import open_clip
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_SOT, _EOT = "<start_of_text>", "<end_of_text>"
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": " "}
_LIGATURES = "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"
_HALF_AND_FULL_WIDTH = range(0xFF01, 0xFFF0)
_CONTROL = r"[\x{00}-\x{08}\x{0B}\x{0E}-\x{1F}\x{7F}\x{206A}-\x{206F}\x{FEFF}\x{FFF9}-\x{FFFC}]"


def build() -> Tokenizer:
    """CLIP's tokenizer: begin, pieces, end; neither padded nor cut."""
    theirs = open_clip.SimpleTokenizer()
    model = models.BPE(
        vocab=theirs.encoder,
        merges=list(theirs.bpe_ranks),
        unk_token=_EOT,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([_SOT, _EOT])
    tokenizer.normalizer = normalizers.Sequence(_cleaning())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{_SOT}|{_EOT}|{_PIECES}"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    ends = ((_EOT, theirs.eot_token_id), (_SOT, theirs.sot_token_id))
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def _cleaning() -> list[Any]:
    # An entity may be escaped twice ("&amp;amp;"), as captions from web pages are.
    exact = [("&amp;", "&"), *_ENTITIES.items(), ("ﬅ", "ſt")]
    folded = [*_LIGATURES, *map(chr, _HALF_AND_FULL_WIDTH)]
    exact += [(one, unicodedata.normalize("NFKC", one)) for one in folded]
    return [
        *(normalizers.Replace(old, new) for old, new in exact if old != new),
        normalizers.Replace(Regex("[ʼ‘-‛]"), "'"),
        normalizers.Replace(Regex("[“-‟]"), '"'),
        normalizers.Replace(Regex(_CONTROL), ""),
        normalizers.NFC(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
        normalizers.Replace(Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς"),  # Lowercase looks at single letters
        normalizers.Lowercase(),
    ]


def write(folder: Path, context_length: int) -> None:
    """Writes the tokenizer's files; captions are cut at `context_length` and padded with the end's id, as CLIP's."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=build(),
        bos_token=_SOT,
        eos_token=_EOT,
        unk_token=_EOT,
        pad_token=_EOT,
        padding_side="right",
        model_max_length=context_length,
        model_input_names=["input_ids", "attention_mask"],
    )
    theirs.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    # The name that transformers 4 and 5 both know; as CLIPTokenizer it would lose the cleaning.
    document = json.loads(config.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    tokenizer = open_clip.SimpleTokenizer()
    (folder / "vocab.json").write_text(json.dumps(tokenizer.encoder, ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{' '.join(pair)}\n" for pair in tokenizer.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
