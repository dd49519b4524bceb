"""Stored states come back as they were written, however they are asked for, and are looked through once."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch

from rayft.training import states

SIZES = [3, 1, 4, 2]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[torch.Tensor]]:
    """Rows of states of two parts, in the folder."""
    torch.manual_seed(0)
    rows = [torch.randn(size, 5).to(request.param) for size in SIZES]
    parts = []
    for part in (0, 1):
        writer = states.Writer(str(tmp_path), "attempt", part)
        for number in range(part, len(rows), 2):
            writer.add(number, rows[number])
        parts.append(writer.close(1.0))
    states.commit(str(tmp_path), parts)
    return str(tmp_path), rows


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [3, 1], [1, 1]])
def test_rows_come_back_with_zeros_behind_the_shorter_ones(
    stored: tuple[str, list[torch.Tensor]], numbers: list[int]
) -> None:
    folder, rows = stored
    opened = states.States(folder)
    for _ in range(2):
        torch.empty(1000).fill_(torch.nan)  # which memory that is used again may hold
        expected = torch.nn.utils.rnn.pad_sequence([rows[number] for number in numbers], batch_first=True)
        assert torch.equal(opened.rows(numbers), expected)


def test_a_row_is_checked_when_it_is_read_first_and_damage_is_told(
    stored: tuple[str, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = stored
    checked: list[int] = []
    plain = zlib.crc32
    monkeypatch.setattr(states.zlib, "crc32", lambda content: checked.append(len(content)) or plain(content))
    opened = states.States(folder)
    for _ in range(3):
        opened.rows([0, 1, 2, 3])
    assert len(checked) == 4
    file = Path(folder) / "attempt" / "0.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of row 2
    file.write_bytes(content)
    again = states.States(folder)
    again.rows([0, 1, 3])
    for _ in range(2):
        with pytest.raises(states.Damaged, match=r"the states of row 2 .* are not as they were written"):
            again.rows([2])
