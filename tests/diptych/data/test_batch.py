"""Batches from the chunks of several workers."""

import pytest
import torch
from torch import Tensor

from diptych.data.batch import Batch, Chunk, Cursors, Rows, merge

WIDTH = 20


def chunk(slots: list[int], *, longest: int) -> Chunk:
    """Rows that tell their slots."""
    number = torch.tensor(slots)
    images = number[:, None, None, None].to(torch.uint8).expand(-1, 4, 5, 3).contiguous().permute(0, 3, 1, 2)
    tokens = torch.zeros(len(slots), WIDTH, dtype=torch.long)
    tokens[:, :longest] = number[:, None]
    none, hard = torch.zeros(len(slots), 0, WIDTH).long(), number[:, None] + 100
    rows = Rows(images, tokens, number, 10 * number, none, hard, tokens[:, None, :], None, tokens)
    return Chunk(tuple(slots), tuple(f"k{slot}" for slot in slots), rows, Cursors(), ())


@pytest.mark.parametrize("parts", [[[4, 5, 6]], [[4, 6], [5]], [[6], [5], [4]]])
def test_rows_come_in_slot_order(parts: list[list[int]]) -> None:
    batch = merge([chunk(slots, longest=3) for slots in parts])
    assert batch.keys == ("k4", "k5", "k6")
    assert batch.images[:, 0, 0, 0].tolist() == [4, 5, 6]
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.caption_ids.tolist() == [4, 5, 6]
    assert batch.sample_ids.tolist() == [40, 50, 60]
    assert batch.tokens.tolist() == [[slot] * 3 for slot in (4, 5, 6)]


@pytest.mark.parametrize(
    ("longest", "multiple", "length"), [(3, 1, 3), (3, 8, 8), (8, 8, 8), (9, 8, 16), (17, 8, WIDTH)]
)
def test_texts_are_padded_to_a_multiple(longest: int, multiple: int, length: int) -> None:
    def lengths(batch: Batch) -> list[int]:
        texts: list[Tensor | None] = [batch.tokens, batch.hard_tokens, batch.teacher_tokens]
        return [text.shape[-1] for text in texts if text is not None]

    assert lengths(merge([chunk([1], longest=longest), chunk([2], longest=1)], text_multiple=multiple)) == [length] * 3
