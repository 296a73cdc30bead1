"""Rows that survive interruptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from casm_fast.data.journal import Journal


def test_rows_stay_and_a_cut_line_goes(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", {"model": "a", "sizes": (1, 2)}) as journal:
        journal.add([{"image_id": "x", "value": 1.5}])
        journal.add([{"image_id": "y", "value": 2}, {"image_id": "z", "value": 3}])
    path = tmp_path / "out" / "rows.jsonl"
    path.write_text(path.read_text() + '{"image_id": "w", "va')
    again = Journal(tmp_path / "out", {"model": "a", "sizes": (1, 2)})
    assert again.known() == {"x", "y", "z"}
    assert again.rows[0] == {"image_id": "x", "value": 1.5}
    with again:
        again.add([{"image_id": "w", "value": 4}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["image_id"] for row in lines] == ["x", "y", "z", "w"]
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        "rows.jsonl",
        "settings.json",
    ]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model": "b", "seed": 0}, "with model 'a' instead of 'b'"),
        ({"model": "a", "seed": 0, "new": 1}, "with new None instead of 1"),
        ({"model": "a"}, "with seed 0 instead of None"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, settings: dict[str, object], told: str) -> None:
    Journal(tmp_path, {"model": "a", "seed": 0})
    with pytest.raises(ValueError) as caught:
        Journal(tmp_path, settings)
    assert str(caught.value) == (
        f"output: expected a folder of the same settings, got {tmp_path} {told}; "
        "give another folder"
    )


def test_adding_wants_an_open_journal(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="expected an entered journal"):
        Journal(tmp_path, {}).add([])
