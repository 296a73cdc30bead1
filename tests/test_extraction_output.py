"""Output that survives: parts, interruptions, locks, full disks, folders that belong to others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_extraction import Painted, Pixels, pictures, truth_boxes

import casm_fast
from casm_fast.data import parts, predictions
from casm_fast.data.decoding import DecodeError
from casm_fast.extraction import Extraction, extract

IMAGES = 23


class Watched(Pixels):
    """Pictures that note who is read, and do something at one of them."""

    def __init__(
        self, at: int = -1, do: Callable[[], None] = lambda: None, broken: Sequence[int] = (7,)
    ) -> None:
        super().__init__(pictures(IMAGES), truth_boxes(IMAGES), broken)
        self.at, self.do = at, do
        self.read: list[int] = []

    def image(self, index: int) -> Any:
        self.read.append(index)
        if index == self.at:
            self.do()
        return super().image(index)


def run(source: Pixels, output: Path | None, **options: Any) -> Extraction:
    # Threads read ahead of an interruption, so that what was read is known without them only.
    settings = {"batch_size": 2, "part_images": 4, "workers": 0, **options}
    return extract(Painted(), source, output, **settings)


@pytest.fixture(scope="module")
def whole() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = run(Watched(), None).table.to_pylist()
    return rows


def fail() -> None:
    raise RuntimeError("the machine is on fire")


# --- parts ----------------------------------------------------------------------------------------


def test_a_folder_holds_parts_that_are_one_table(whole: Any, tmp_path: Path) -> None:
    made = run(Watched(), tmp_path / "out")
    assert (made.path, made.images, made.made, made.errors) == (tmp_path / "out", IMAGES, IMAGES, 1)
    assert sorted(os.listdir(tmp_path / "out")) == [
        ".lock", "extraction.json",
        *(f"part-{k:09d}-{min(k + 4, IMAGES):09d}.parquet" for k in range(0, IMAGES, 4)),
    ]  # fmt: skip
    assert made.table.to_pylist() == whole
    table, description = predictions.read(tmp_path / "out")
    assert table.equals(made.table)
    assert description == made.description
    assert (description.source, description.saliency_size) == ("pixels", (8, 8))
    in_memory = casm_fast.evaluate(run(Watched(), None))
    assert str(casm_fast.evaluate(tmp_path / "out")) == str(in_memory)
    for part in parts.listed(tmp_path / "out"):  # each is a table of predictions by itself
        alone, same = predictions.read(part.path)
        assert alone.to_pylist() == whole[part.start : part.stop]
        assert same.model == description.model


def test_a_file_has_the_rows_of_the_folder_and_nothing_beside_it(
    whole: Any, tmp_path: Path
) -> None:
    made = run(Watched(), tmp_path / "boxes.parquet")
    assert os.listdir(tmp_path) == ["boxes.parquet"]
    assert made.table.to_pylist() == whole
    assert pq.ParquetFile(tmp_path / "boxes.parquet").num_row_groups == 6
    again = run(Watched(), tmp_path / "boxes.parquet")
    assert (again.made, os.listdir(tmp_path)) == (IMAGES, ["boxes.parquet"])


def test_time_makes_parts_too(tmp_path: Path) -> None:
    run(Watched(), tmp_path / "out", part_images=1000, part_seconds=0.0)
    assert len(parts.listed(tmp_path / "out")) == 12  # one per batch


@pytest.mark.parametrize("name", ["out", "boxes.parquet"])
def test_a_run_that_fails_is_taken_up_where_it_failed(
    whole: Any, name: str, tmp_path: Path
) -> None:
    output = tmp_path / name
    with pytest.raises(RuntimeError, match="fire"):
        run(Watched(13, fail), output)
    folder = output if name == "out" else parts.working_folder(output)
    before = {part.path: part.path.stat().st_mtime_ns for part in parts.listed(folder)}
    assert sum(part.stop - part.start for part in parts.listed(folder)) == 12
    source = Watched()
    made = run(source, output)
    assert source.read == list(range(12, IMAGES))
    assert (made.images, made.made, made.errors) == (IMAGES, IMAGES - 12, 1)
    assert f"{IMAGES} images, 12 of them from before, 1 unreadable in" in str(made)
    assert made.table.to_pylist() == whole
    if name == "out":
        assert all(path.stat().st_mtime_ns == written for path, written in before.items())
        done = Watched()
        assert run(done, output).made == 0
        assert done.read == []
    else:
        assert os.listdir(tmp_path) == [name]


def test_rows_of_another_batch_size_are_taken_up(whole: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(Watched(13, fail), tmp_path / "out", batch_size=3)
    assert run(Watched(), tmp_path / "out", batch_size=5).table.to_pylist() == whole


def test_the_batch_size_of_the_first_run_is_kept(tmp_path: Path) -> None:
    run(Watched(), tmp_path / "out", batch_size=None)
    claim = tmp_path / "out" / parts.CLAIM
    content = json.loads(claim.read_text())
    assert content["notes"] == {"batch_size": 64}
    content["notes"]["batch_size"] = 3
    claim.write_text(json.dumps(content))
    for part in parts.listed(tmp_path / "out"):
        part.path.unlink()
    made = run(Watched(), tmp_path / "out", batch_size=None, part_images=1)
    assert made.description.config["batch_size"] == 3
    assert [part.stop - part.start for part in parts.listed(made.path)] == [3] * 7 + [2]


def test_a_damaged_part_is_made_again(
    whole: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(Watched(), tmp_path / "out")
    cut, short = parts.listed(tmp_path / "out")[1:3]
    cut.path.write_bytes(cut.path.read_bytes()[:-7])
    predictions.write(predictions.read(short.path)[0].slice(0, 3), short.path)
    source = Watched()
    made = run(source, tmp_path / "out")
    assert source.read == list(range(4, 12))
    assert made.table.to_pylist() == whole
    assert caplog.messages[1:3] == [
        f"{cut.path} is damaged, and made again",
        f"{short.path} is damaged, and made again",
    ]


def test_what_a_killed_run_left_half_written_is_swept_up(tmp_path: Path) -> None:
    run(Watched(), tmp_path / "out", limit=4)
    mine = tmp_path / "out" / ".part-000000000-000000004.parquet.999.tmp"
    other = tmp_path / "out" / ".part-000000020-000000023.parquet.999.tmp"
    for leftover in (mine, other):
        leftover.write_bytes(b"half")
    run(Watched(), tmp_path / "out", limit=4)
    assert not mine.exists()
    assert other.exists()  # of a place that another run may be filling right now


def test_a_folder_that_is_not_complete_is_not_scored(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(Watched(13, fail), tmp_path / "out")
    with pytest.raises(FileNotFoundError) as caught:
        casm_fast.evaluate(tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: expected the rows of 23 images, got 12; the casm-fast extract that "
        "began it goes on where it stopped"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        casm_fast.evaluate(tmp_path / "empty")
    assert str(caught.value) == (
        f"{tmp_path / 'empty'}: expected a folder of casm-fast extract, got one without "
        "extraction.json"
    )


# --- shards ---------------------------------------------------------------------------------------


def test_shards_fill_one_folder_at_the_same_time(whole: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    workers = [
        threading.Thread(target=run, args=(Watched(), out), kwargs={"shard": f"{k}/4"})
        for k in (1, 2, 4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    third = run(Watched(), out, shard="3/4")
    assert third.table.to_pylist() == whole[11:17]
    assert third.description.config["shard"] == "3/4"
    table, description = predictions.read(out)
    assert table.to_pylist() == whole
    assert description.config["shard"] is None


def test_a_run_without_a_shard_makes_what_shards_left(whole: Any, tmp_path: Path) -> None:
    run(Watched(), tmp_path / "out", shard="2/4")
    source = Watched()
    made = run(source, tmp_path / "out")
    assert source.read == [*range(5), *range(11, IMAGES)]
    assert made.table.to_pylist() == whole


# --- guards ---------------------------------------------------------------------------------------


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(Watched(), out)
    for options, difference in (
        (
            {"rule": "value", "alpha": 0.5},
            "rule 'mean' instead of 'value' and alpha 1.0 instead of 0.5",
        ),
        ({"limit": 5}, "images 23 instead of 5 and ids"),
        ({"amp": "bf16"}, "amp 'off' instead of 'bf16'"),
        ({"resize_policy": "squash"}, "policy 'crop' instead of 'squash'"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            run(Watched(), out, **options)
        assert str(caught.value).startswith(
            f"output: expected rows of the same settings, got {out} with {difference}"
        )
        assert str(caught.value).endswith(
            "; give another output, or delete this folder to begin anew"
        )
    model = Painted()
    model.weight.data += 1
    with pytest.raises(ValueError, match=r"with model '\w{16}' instead of '\w{16}'; give another"):
        extract(model, Watched(), out)
    renamed = Watched()
    renamed.image_id = lambda index: f"photo {index}"  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"with ids '\w{16}' instead of '\w{16}'; give another"):
        run(renamed, out)
    run(Watched(), out, batch_size=3, workers=1, part_images=9, device="cpu")  # rows do not know


def test_an_interrupted_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(Watched(13, fail), tmp_path / "boxes.parquet")
    with pytest.raises(ValueError) as caught:
        run(Watched(), tmp_path / "boxes.parquet", rule="area")
    assert str(caught.value) == (
        f"output: expected rows of the same settings, got {tmp_path / '.boxes.parquet.parts'} with "
        "rule 'mean' instead of 'area'; give another output, or delete this folder to begin anew"
    )


def test_what_is_no_folder_of_an_extraction_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / parts.CLAIM).write_text("{")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / parts.CLAIM).write_text('{"format": 2}')
    for name, message in (
        (
            "photos",
            f"output: expected a new folder or one of casm-fast extract, got {tmp_path / 'photos'} "
            "with a.jpg; give another folder",
        ),
        (
            "file",
            "output: expected a folder, or a file that ends with .parquet, got the file "
            f"{tmp_path / 'file'}",
        ),
        (
            "damaged",
            f"{tmp_path / 'damaged' / parts.CLAIM}: expected the settings of an extraction, got a "
            "file that cannot be read; delete the folder to begin anew",
        ),
        (
            "newer",
            f"{tmp_path / 'newer' / parts.CLAIM}: expected format 1, got 2; read it with the "
            "casm_fast that wrote it",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            run(Watched(), tmp_path / name)
        assert str(caught.value) == message
    assert os.listdir(tmp_path / "photos") == ["a.jpg"]


def test_a_second_run_is_refused_while_the_first_lives(whole: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(ValueError) as caught:
            run(Watched(), out, shard="2/2")
        refused.append(str(caught.value))

    first = run(Watched(13, second), out)
    assert refused == [
        f"output: expected a folder that no other run fills, got {out}, where a running one makes "
        "some of the images 11 to 22; wait for its end, or give another output"
    ]
    assert first.table.to_pylist() == whole


def test_the_lock_of_a_killed_process_is_gone(whole: Any, tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from casm_fast.data import parts\n"
        "with parts._locked(Path(sys.argv[1]), range(23)):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    out = tmp_path / "out"
    run(Watched(), out, shard="1/2")
    with subprocess.Popen(
        [sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="that no other run fills"):
            run(Watched(), out)
        child.kill()
    assert run(Watched(), out).table.to_pylist() == whole


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["out", "boxes.parquet"])
def test_a_signal_lets_the_batch_end_and_writes(
    whole: Any, number: signal.Signals, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / name
    source = Watched(12, lambda: os.kill(os.getpid(), number))
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        run(source, output, part_images=1000)
    if number == signal.SIGTERM:
        assert caught.value.args == (143,)
    else:
        assert caught.value.args == ("14 of 23 images are done; the same command goes on there",)
    assert caplog.messages == ["stopped: 14 of 23 images are done; the same command goes on there"]
    rest = Watched()
    assert run(rest, output).table.to_pylist() == whole
    assert rest.read == list(range(14, IMAGES))


def test_kills_at_random_moments_lose_and_repeat_nothing() -> None:
    kills = os.environ.get("CASM_FAST_TEST_KILLS", "6")
    program = Path(__file__).with_name("kill_extractions.py")
    seed = str(time.time_ns() % 10_000)
    done = subprocess.run(
        [sys.executable, program, "--kills", kills, "--seed", seed], capture_output=True, text=True
    )
    assert done.returncode == 0, f"--seed {seed}\n{done.stderr}"
    assert "came through, equal to an uninterrupted one" in done.stdout


# --- disks ----------------------------------------------------------------------------------------


def test_a_full_disk_costs_no_written_row(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write, calls = tmp_path / "out", pq.write_table, []

    def fill(table: Any, stream: Any, **options: Any) -> None:
        calls.append(table)
        if len(calls) == 3:
            stream.write(b"half")
            raise OSError(28, "No space left on device")
        write(table, stream, **options)

    monkeypatch.setattr(pq, "write_table", fill)
    with pytest.raises(OSError) as caught:
        run(Watched(), out)
    assert caught.value.strerror == (
        f"output: expected room for part-000000008-000000012.parquet in {out}, got 'No space left "
        "on device'; make room, and the same command goes on where it stopped"
    )
    assert [name for name in os.listdir(out) if name.endswith(".tmp")] == []
    assert [(part.start, part.stop) for part in parts.listed(out)] == [(0, 4), (4, 8)]
    source = Watched()
    assert run(source, out).table.to_pylist() == whole
    assert source.read == list(range(8, IMAGES))


@pytest.mark.parametrize("name", ["out", "boxes.parquet"])
def test_a_disk_that_is_really_full(whole: Any, name: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("expected the right to mount a small tmpfs")
    try:
        ballast = disk / ".ballast"  # room for the first parts alone
        ballast.write_bytes(bytes(32 << 10))
        with pytest.raises(OSError, match=r"expected room for .*, got 'No space left on device'"):
            run(Watched(), disk / name, part_images=2)
        assert not [path for path in disk.rglob("*") if path.suffix == ".tmp"]
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        assert run(Watched(), disk / name, part_images=2).table.to_pylist() == whole
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# --- strict ---------------------------------------------------------------------------------------


def test_strict_stops_at_the_first_image_that_cannot_be_read(whole: Any, tmp_path: Path) -> None:
    message = "picture 7: it is cut short (strict stops at the first; without it, a row says so)"
    for output in (None, tmp_path / "out"):
        source = Watched()
        with pytest.raises(DecodeError, match=f"^{re.escape(message)}$"):
            run(source, output, strict=True)
        assert max(source.read) == 7
    assert [part.stop for part in parts.listed(tmp_path / "out")] == [4, 6]
    assert run(Watched(), tmp_path / "out").table.to_pylist() == whole
    with pytest.raises(DecodeError, match=f"^{re.escape(message)}$"):
        run(Watched(), tmp_path / "out", strict=True)  # the row was there already


def test_boxes_that_cannot_be_read_are_an_error_of_their_image() -> None:
    class Torn(Watched):
        def boxes(self, index: int) -> Any:
            if index == 3:
                raise ValueError("3.xml: no element found")
            return super().boxes(index)

    row = run(Torn(), None).table.to_pylist()[3]
    assert (row["image_id"], row["error"]) == ("picture 3", "3.xml: no element found")
    assert np.isin([row[name] for name in ("x0", "predicted", "gt_boxes")], [None]).all()
