"""Language models as writers: tiny random ones, whose answers are nonsense, and stand-ins whose answers are worse."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import diptych.testing as make
from diptych.config import from_tree
from diptych.data import captions
from diptych.data.shards import list_shards, read_shard
from diptych.errors import ConfigError
from diptych.testing import tiny_sample
from diptych_data.negatives.language.family import Raw, Writer
from diptych_data.negatives.language.fill_mask import FillMask
from diptych_data.negatives.language.instruct import Instruct, first_line, read_prompts
from diptych_data.negatives.language.plausible import PlausibleConfig
from diptych_data.negatives.make import NegativesSummary, negatives
from diptych_data.negatives.options import NegativesOptions
from diptych_data.negatives.words import normal

SPECIAL = ["[PAD]", "[UNK]", "[MASK]", "[BOS]", "</s>"]
TEXTS = ("a red fox", "two owl on a hat", "the drum in snow", "a fox")
VOCABULARY = [*SPECIAL, *dict.fromkeys(" ".join(TEXTS).split()), "blue", "under", "Caption", ":", ".", ",", "is", "big"]


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    names |= {"bos_token": "[BOS]", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)


def saved(folder: Path, model: Any) -> str:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def masked(tmp_path: Path) -> str:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(VOCABULARY), pad_token_id=0, **sizes)
    return saved(tmp_path / "masked", transformers.BertForMaskedLM(config))


@pytest.fixture
def causal(tmp_path: Path) -> str:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    config = transformers.GPT2Config(vocab_size=len(VOCABULARY), bos_token_id=3, eos_token_id=4, **sizes)
    return saved(tmp_path / "causal", transformers.GPT2LMHeadModel(config))


@pytest.fixture
def seq2seq(tmp_path: Path) -> str:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 4, "decoder_start_token_id": 0}
    config = transformers.T5Config(vocab_size=len(VOCABULARY), **sizes, **ids)
    return saved(tmp_path / "seq2seq", transformers.T5ForConditionalGeneration(config))


def shards(folder: Path) -> Path:
    for number in range(2):
        samples = [tiny_sample(f"s{number}{n}", caption=text) for n, text in enumerate(TEXTS)]
        make.write_shard(folder / f"{number:06d}.tar", samples)
    return folder


def run(source: Path, out: Path, **options: object) -> NegativesSummary:
    given = {"shards": str(source), "out": str(out), "refine": None, "rules": [], "positives": [], "workers": 1}
    return negatives(from_tree(NegativesOptions, given | options))


def texts(folder: Path, column: str) -> list[tuple[str, list[str]]]:
    samples = [sample for shard in list_shards(str(folder)) for sample in read_shard(shard)]
    return [(one.members["txt"].decode(), captions.parse(one.members).texts(column)) for one in samples]


def test_a_masked_model_changes_one_word(tmp_path: Path, masked: str) -> None:
    write = FillMask(masked, top_k=3, batch=2).load()
    found = write(TEXTS, 0)
    assert len(found) == len(TEXTS)
    for text, raws in zip(TEXTS, found, strict=True):
        assert raws
        for raw in raws:
            assert len(raw.text.split()) == len(text.split())
            assert sum(a != b for a, b in zip(raw.text.split(), text.split(), strict=True)) <= 1
    assert found == FillMask(masked, top_k=3, batch=64).load()(TEXTS, 9)  # batches and seeds change nothing
    assert {raw.type for raw in found[0]} == {"colour", "object"}


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("per_type", [1, 2])
def test_a_model_answers_each_prompt(kind: str, per_type: int, request: pytest.FixtureRequest) -> None:
    model = Instruct(request.getfixturevalue(kind), per_type=per_type, max_new_tokens=5, batch=4)
    write = model.load()
    state = torch.get_rng_state()
    found = write(TEXTS, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert [len(raws) for raws in found] == [6 * per_type] * len(TEXTS)
    assert [raw.type for raw in found[0]][::per_type] == list(read_prompts(None))
    assert found == model.load()(TEXTS, 1)
    assert (found == write(TEXTS, 2)) == (per_type == 1)  # several answers are sampled


def test_models_write_the_same_shards_again(tmp_path: Path, masked: str, causal: str) -> None:
    source = shards(tmp_path / "in")
    language = [{"type": "fill_mask", "model": masked}, {"type": "instruct", "model": causal, "per_type": 2}]
    summary = run(source, tmp_path / "one", language=language)
    run(source, tmp_path / "two", language=language, workers=2)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert any(kind.startswith("fill_mask") for kind in summary.kinds)
    for truth, found in texts(tmp_path / "one", "hard"):
        assert normal(truth) not in map(normal, found)


@dataclass(frozen=True)
class Broken(Writer, name="broken_in_a_test"):
    """Answers that models give when they fail, and one that is right."""

    def load(self) -> Callable[[Sequence[str], int], list[list[Raw]]]:
        def write(given: Sequence[str], seed: int) -> list[list[Raw]]:
            return [[Raw(text, "object") for text in self.answers(caption)] for caption in given]

        return write

    def answers(self, caption: str) -> list[str]:
        bad = ["", " \n\t", "...", caption, caption.upper() + "!", "word " * 10**5, "x" * 10**6, "owl owl owl owl"]
        return [*bad, "\ud800", "\x00\x01", "one lone zeppelin", "one lone zeppelin", "One lone zeppelin."]


def test_broken_answers_are_dropped_and_counted(tmp_path: Path) -> None:
    source = shards(tmp_path / "in")
    summary = run(source, tmp_path / "out", language=["broken_in_a_test"])
    assert summary.dropped == {"empty": 8 * 5, "equal": 8 * 2, "repeated": 8, "too_long": 8 * 2, "twice": 8 * 2}
    assert all(found == ["one lone zeppelin"] for _, found in texts(tmp_path / "out", "hard"))


@dataclass(frozen=True)
class Says(Writer, name="says_in_a_test"):
    """A paraphrase, and the same as a negative."""

    def load(self) -> Callable[[Sequence[str], int], list[list[Raw]]]:
        return lambda given, seed: [[Raw("my zeppelin", "object"), Raw("my zeppelin", "paraphrase")] for _ in given]


def test_paraphrases_are_true_and_so_no_negatives(tmp_path: Path) -> None:
    run(shards(tmp_path / "in"), tmp_path / "out", language=["says_in_a_test"])
    assert all(found == ["my zeppelin"] for _, found in texts(tmp_path / "out", "paraphrase"))
    assert all(found == [] for _, found in texts(tmp_path / "out", "hard"))


def test_likelihood_is_that_of_each_text_alone(causal: str) -> None:
    score = PlausibleConfig(causal, batch=3).load()
    together = score(TEXTS)
    model = transformers.AutoModelForCausalLM.from_pretrained(causal).eval()
    for text, value in zip(TEXTS, together, strict=True):
        ids = tokenizer()("[BOS]" + text, return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids).logits[0, :-1].detach()
        expected = float(logits.log_softmax(-1).gather(1, ids[0, 1:, None]).mean())
        assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("max_drop", "any_left"), [(1000.0, True), (-1000.0, False)])
def test_implausible_negatives_go(tmp_path: Path, causal: str, max_drop: float, *, any_left: bool) -> None:
    rules = ["replace"]
    plausible = {"model": causal, "max_drop": max_drop}
    summary = run(shards(tmp_path / "in"), tmp_path / "out", rules=rules, plausible=plausible)
    assert (summary.negatives > 0) == any_left
    assert (summary.dropped.get("implausible", 0) == 0) == any_left


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("\n\n1. “a blue fox”\nbecause", "a blue fox"),
        ("- a fox's den", "a fox's den"),
        ("", ""),
        ("   \n ", ""),
        ("2 foxes", "2 foxes"),
    ],
)
def test_of_an_answer_the_first_line_counts(answer: str, text: str) -> None:
    assert first_line(answer) == text


@pytest.mark.parametrize("text", ["- a", "object: no place", "{", "object: 3", ""])
def test_prompts_that_are_none_are_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="prompt"):
        read_prompts(path)


def test_a_model_that_is_not_there_is_one_line_and_nothing_unpickled(tmp_path: Path, masked: str) -> None:
    with pytest.raises(ConfigError, match="no fill_mask model"):
        FillMask(str(tmp_path / "nowhere")).load()
    weights = Path(masked) / "model.safetensors"
    torch.save({}, Path(masked) / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ConfigError, match="no fill_mask model"):
        FillMask(masked).load()


def test_code_of_a_folder_does_not_run(tmp_path: Path, causal: str) -> None:
    config = json.loads((Path(causal) / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (Path(causal) / "config.json").write_text(json.dumps(config))
    (Path(causal) / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError):
        Instruct(causal).load()
    assert not (tmp_path / "ran").exists()
