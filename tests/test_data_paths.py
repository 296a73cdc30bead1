"""Images by patterns, lists, manifests, tar shards and URLs: the same pictures in every way."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from casm_fast.data import DecodeError, FolderSource, open_source
from casm_fast.data.lines import Lines
from casm_fast.data.source import FileSource, ImageSource, locate
from casm_fast.data.tar import members
from casm_fast.data.webdataset import expand_braces

fsspec = pytest.importorskip("fsspec", reason="needs casm_fast[remote]")

NAMES = ["ant/a 1.jpg", "ant/b.png", "bee/c.jpg", "bee/d.JPEG", "bee/deep/é.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8 + k, 9, 3), np.uint8)).save(path)
    (root / "bee/notes.txt").write_text("no image")
    (root / "bee/.hidden.jpg").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def pictures(photos: Path) -> list[np.ndarray]:
    source = FolderSource(photos)
    assert source.files == NAMES
    return [source.image(k) for k in range(len(source))]


def check(source: ImageSource, pictures: list[np.ndarray], ids: list[str]) -> None:
    """The pictures, in order, from several threads, after pickling, and by the source's name."""
    assert isinstance(source, ImageSource)
    assert [source.image_id(k) for k in range(len(source))] == ids
    again = [pickle.loads(pickle.dumps(source))]
    if source.name != "list:-":
        again.append(open_source(source.name))
    for copy in (source, *again):
        assert copy.name == source.name
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(copy.image, range(len(copy))))
        for got, expected in zip(made, pictures, strict=True):
            np.testing.assert_array_equal(got, expected)
        for k in range(len(copy)):
            assert copy.label(k) == source.label(k)
            np.testing.assert_array_equal(copy.boxes(k), source.boxes(k))
    if isinstance(source, FileSource) and "://" not in source.address(0):
        assert all(os.path.isfile(source.address(k)) for k in range(len(source)))
    assert locate(source, ids[::-1]) == list(range(len(ids)))[::-1]


# --- patterns and lists ---------------------------------------------------------------------------


def test_a_pattern(photos: Path, pictures: list[np.ndarray]) -> None:
    source = open_source(f"{photos}/**/*")
    check(source, pictures, NAMES)
    assert source.found == (f"glob: 5 images that {photos}/**/* names; missing: labels and boxes")
    assert {source.label(k) for k in range(5)} == {-1}
    assert not source.has_boxes
    check(open_source(f"{photos}/ant/[ab]*"), pictures[:2], ["a 1.jpg", "b.png"])
    assert len(open_source(photos / "bee" / "*.[jJ]*")) == 2


def test_a_pattern_of_this_folder(
    photos: Path, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    check(open_source("*/*.jpg"), [pictures[0], pictures[2]], ["ant/a 1.jpg", "bee/c.jpg"])
    check(open_source("ant/*"), pictures[:2], ["a 1.jpg", "b.png"])


def test_a_folder_with_brackets_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x[1]").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "x[1]/a.png")
    assert open_source(tmp_path / "x[1]").name == f"folder:{tmp_path}/x[1]"
    assert open_source(f"folder:{tmp_path}/x[1]").name == f"folder:{tmp_path}/x[1]"


def test_a_list(photos: Path, pictures: list[np.ndarray], tmp_path: Path) -> None:
    lines = [NAMES[2], str(photos / NAMES[0]), NAMES[4]]
    (photos / "list.txt").write_text("\n".join(lines) + "\r\n\n", encoding="utf-8")
    source = open_source(f"list:{photos / 'list.txt'}")
    check(source, [pictures[2], pictures[0], pictures[4]], lines)
    assert source.found == f"list: 3 paths in {photos / 'list.txt'}; missing: labels and boxes"
    (tmp_path / "gone.txt").write_text("gone.jpg")
    with pytest.raises(DecodeError) as caught:
        open_source(f"list:{tmp_path / 'gone.txt'}").image(0)
    assert str(caught.value) == f"cannot read {tmp_path}/gone.jpg: No such file or directory"


def test_a_list_of_standard_input(
    photos: Path, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    for spec in ("-", "list:-"):
        text = io.TextIOWrapper(io.BytesIO(b"ant/b.png\nbee/c.jpg\n"))
        monkeypatch.setattr(sys, "stdin", text)
        source = open_source(spec)
        check(source, pictures[1:3], ["ant/b.png", "bee/c.jpg"])
        assert source.name == "list:-"


@given(st.lists(st.sampled_from(["a", "bc", "é", "\r", "\n", "\r\n", " ", "x\ry"]), max_size=40))
def test_lines_are_those_of_the_text(parts: list[str]) -> None:
    text = "".join(parts).encode()
    expected = [line.rstrip(b"\r") for line in text.split(b"\n")]
    made = list(Lines.copied([text]))
    # A line of one return is empty; one of several is a name that nobody has.
    assert [line for line in made if line] == [line.decode() for line in expected if line]


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
def test_lines_across_the_pieces_of_a_search(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casm_fast.data.lines._PIECE", piece)
    assert list(Lines.copied([b"\n\nab\r\n\r\nc\n\n\ndef"])) == ["ab", "c", "def"]
    assert list(Lines.copied([])) == []
    assert list(Lines.copied([b"\n"])) == []


def test_lines_index_like_a_sequence() -> None:
    lines = Lines.spooled(["a", "b", os.fsdecode(b"\xff.jpg")])
    assert (len(lines), lines[0], lines[-2], lines[2]) == (3, "a", "b", os.fsdecode(b"\xff.jpg"))
    with pytest.raises(IndexError):
        lines[3]
    for name in ("a\nb", ""):
        with pytest.raises(ValueError) as caught:
            Lines.spooled([name])
        assert str(caught.value) == f"expected names of files of one line each, got {name!r}"


def test_a_list_costs_no_memory_worth_naming(tmp_path: Path) -> None:
    count = 200_000
    path = tmp_path / "list.txt"
    path.write_text("".join(f"/data/photos/{k:012d}.jpg\n" for k in range(count)))
    tracemalloc.start()
    try:
        source = open_source(f"list:{path}", decoder="pillow")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert source.image_id(count - 1) == f"/data/photos/{count - 1:012d}.jpg"
    assert kept / count < 5  # 4.3 bytes a path: the number of its first byte
    assert peak / count < 40  # 26 bytes


# --- manifests ------------------------------------------------------------------------------------


def test_a_manifest(photos: Path, pictures: list[np.ndarray]) -> None:
    file = photos / "set.parquet"
    boxes = [[[0, 0, 2, 3]], [], None, [[1, 1, 2, 2], [0, 0, 9, 9]], [[3, 3, 3, 4]]]
    columns = {"path": NAMES, "label": ["bee", "ant", None, "bee", "cat"], "boxes": boxes}
    pq.write_table(pa.table({**columns, "other": range(5)}), file, row_group_size=2)
    source = open_source(f"parquet:{file}")
    check(source, pictures, NAMES)
    assert source.classes == ("ant", "bee", "cat")
    assert [source.label(k) for k in range(5)] == [1, 0, -1, 1, 2]
    assert [source.boxes(k).tolist() for k in range(5)] == [b or [] for b in boxes]
    assert source.boxes(0).dtype == np.int32
    assert source.boxes(1).shape == (0, 4)
    assert source.boxes(-1).tolist() == [[3, 3, 3, 4]]
    assert source.has_boxes
    assert source.found == f"parquet: 5 images in {file} of 3 classes with 4 boxes"


@pytest.mark.parametrize(
    ("label", "boxes", "expected"),
    [
        (pa.array([3, None, 0], pa.int64()), None, ((), [3, -1, 0])),
        (
            pa.array(["x", "a", "x"]).dictionary_encode(),
            pa.array([[[0.5, 0.2, 3.0, 4.1]], [], []], pa.list_(pa.list_(pa.float32(), 4))),
            (("a", "x"), [1, 0, 1]),
        ),
        (None, pa.array([[], None, []], pa.large_list(pa.list_(pa.uint8()))), ((), [-1] * 3)),
    ],
)
def test_kinds_of_columns(label: Any, boxes: Any, expected: Any, photos: Path) -> None:
    columns = {"path": NAMES[:3], "label": label, "boxes": boxes}
    table = pa.table({name: column for name, column in columns.items() if column is not None})
    pq.write_table(table, photos / "kinds.parquet")
    source = open_source(f"parquet:{photos / 'kinds.parquet'}")
    assert (source.classes, [source.label(k) for k in range(3)]) == expected
    assert source.has_boxes == (boxes is not None)
    if label is not None and boxes is not None:
        assert source.boxes(0).tolist() == [[0, 0, 3, 5]]
    missing = [name for name, column in columns.items() if column is None]
    assert source.found.endswith(f"; missing: {' and '.join(missing)}" if missing else " boxes")


# --- tar files ------------------------------------------------------------------------------------


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    for shard, names in enumerate((NAMES[:2], [], NAMES[2:])):
        with tarfile.open(root / f"s-{shard:02d}.tar", "w") as archive:
            for name in names:
                stem = name.rpartition(".")[0]
                if name != NAMES[1]:
                    add(archive, f"{stem}.cls", b"%d\n" % NAMES.index(name))
                add(archive, f"{stem}.seg.png", b"a mask")
                add(archive, name, (photos / name).read_bytes())
                add(archive, f"{stem}.json", b"{}")
    return root


def test_webdataset(shards: Path, pictures: list[np.ndarray]) -> None:
    spec = f"webdataset:{shards}/s-{{00..02}}.tar"
    source = open_source(spec)
    ids = [f"s-{0 if k < 2 else 2:02d}.tar/{name}" for k, name in enumerate(NAMES)]
    check(source, pictures, ids)
    assert [source.label(k) for k in range(5)] == [0, -1, 2, 3, 4]
    assert source.name == spec
    assert source.found == (
        f"webdataset: 5 images in 3 shards of {spec[11:]}; missing: labels of 1, boxes"
    )
    np.testing.assert_array_equal(source.image(-1), pictures[-1])
    for other in (shards, f"{shards}/s-*.tar", f"{shards}/s-0{{0,1,2}}.tar"):
        check(open_source(f"webdataset:{other}"), pictures, ids)
    check(open_source(f"webdataset:{shards}/s-02.tar"), pictures[2:], ids[2:])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(form: int, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w", format=form) as archive:
        for k, length in enumerate([1, 60, 99, 100, 101, 155, 190]):
            folder = "d" * (length // 2)
            add(archive, f"{folder}/{k}{'n' * (length - len(folder))}"[:250], rng.bytes(13 * k))
        if form != tarfile.USTAR_FORMAT:
            add(archive, f"{'long/' * 80}é.jpg", rng.bytes(600))
        folder = tarfile.TarInfo("a folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("a link")
        link.type, link.linkname = tarfile.SYMTYPE, "x" * 150
        if form != tarfile.USTAR_FORMAT:
            archive.addfile(link)
        add(archive, "last", b"content")
    with tarfile.open(path) as archive:
        expected = [(info.name, info.offset_data, info.size) for info in archive if info.isfile()]
        contents = [archive.extractfile(name).read() for name, *_ in expected]  # type: ignore
    found = list(members(path))
    assert [member[:3] for member in found] == expected
    assert [m.small for m in found] == [c if len(c) <= 64 else b"" for c in contents]


def test_a_size_beyond_eight_gibibytes(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("huge.bin")
        info.size = 9 * 2**30
        path = tmp_path / "x.tar"
        with path.open("wb") as stream:
            stream.write(info.tobuf(form))
            place = stream.tell()
            stream.truncate(place + info.size)  # a hole: no disk is used
        assert [member[:3] for member in members(path)] == [("huge.bin", place, info.size)]


def test_broken_shards(shards: Path, tmp_path: Path) -> None:
    whole = (shards / "s-02.tar").read_bytes()
    path = tmp_path / "x.tar"
    cases = {
        b"": "with one of 0 bytes",
        b"x" * 2000: "with something else at byte 0",
        whole[:512] + b"7" * 512 + b"y" * 3500: "with something else at byte 1,024",
    }
    for content, what in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            open_source(f"webdataset:{path}")
        assert str(caught.value) == (
            f"webdataset: expected an uncompressed tar file, got {path} {what}"
        )
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "a.jpg", b"")
    with pytest.raises(ValueError, match="expected an uncompressed tar file"):
        open_source(f"webdataset:{path}")

    with tarfile.open(shards / "s-02.tar") as archive:
        last = [info for info in archive if info.name.endswith(".png")][-1]
    path.write_bytes(whole[: last.offset_data + 10])
    source = open_source(f"webdataset:{path}")
    assert source.image(0).shape
    with pytest.raises(DecodeError) as caught:
        source.image(2)
    name = "x.tar/bee/deep/é.png"
    assert str(caught.value) == f"cannot read {name}: {path} ends before the file does"


def test_braces() -> None:
    assert expand_braces("a{08..10}.t") == ["a08.t", "a09.t", "a10.t"]
    assert expand_braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]
    assert expand_braces("plain") == ["plain"]


# --- URLs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(photos: Path) -> str:
    memory = fsspec.filesystem("memory")
    for name in [*NAMES, "bee/notes.txt"]:
        memory.pipe_file(f"/bucket/photos/{name}", (photos / name).read_bytes())
    return "memory://bucket/photos"


def test_a_folder_behind_a_url(bucket: str, pictures: list[np.ndarray]) -> None:
    source = open_source(bucket)
    check(source, pictures, NAMES)
    assert source.classes == ("ant", "bee")
    assert [source.label(k) for k in range(5)] == [0, 0, 1, 1, 1]
    assert source.found == (f"url: 5 images in {bucket}, of 2 classes in folders; missing: boxes")
    flat = open_source(f"{bucket}/ant/")
    check(flat, pictures[:2], ["a 1.jpg", "b.png"])
    assert flat.found == (
        f"url: 2 images in {bucket}/ant, without classes; missing: labels and boxes"
    )
    check(open_source(f"{bucket}/bee/c.jpg"), pictures[2:3], ["c.jpg"])
    check(open_source(f"{bucket}/**/*.jpg"), [pictures[0], pictures[2]], [NAMES[0], NAMES[2]])


def test_a_local_folder_behind_a_url(photos: Path, pictures: list[np.ndarray]) -> None:
    check(open_source(f"file://{photos}"), pictures, NAMES)


def test_lists_and_manifests_of_urls(
    bucket: str, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text(f"{bucket}/{NAMES[1]}\n")
    check(open_source(f"list:{tmp_path}/list.txt"), pictures[1:2], [f"{bucket}/{NAMES[1]}"])
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/photos/list.txt", f"{NAMES[3]}\n".encode())
    check(open_source(f"list:{bucket}/list.txt"), pictures[3:4], [NAMES[3]])
    stream = io.BytesIO()
    pq.write_table(pa.table({"path": NAMES[:2]}), stream)
    memory.pipe_file("/bucket/photos/set.parquet", stream.getvalue())
    check(open_source(f"parquet:{bucket}/set.parquet"), pictures[:2], NAMES[:2])


def test_a_url_that_cannot_be_read(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("memory://bucket/gone.jpg\n")
    with pytest.raises(DecodeError) as caught:
        open_source(f"list:{tmp_path}/list.txt").image(0)
    assert str(caught.value) == "cannot read memory://bucket/gone.jpg: /bucket/gone.jpg"


# --- refusals -------------------------------------------------------------------------------------


def test_refusals(photos: Path, shards: Path, tmp_path: Path) -> None:
    def manifest(name: str, **columns: Any) -> str:
        pq.write_table(pa.table(columns), tmp_path / name)
        return f"parquet:{tmp_path / name}"

    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "text.parquet").write_text("text")
    with tarfile.open(tmp_path / "none.tar", "w") as archive:
        add(archive, "a.txt", b"")
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        add(archive, "a.cls", b"cat")
    f = str(tmp_path)
    cases: list[tuple[str, type[Exception], str]] = [
        (f"{f}/*.jpg", FileNotFoundError,
         f"open_source: expected image files that {f}/*.jpg names, got none; quote the pattern for "
         "the shell, and write ** for any folders"),
        (f"list:{f}/none.txt", FileNotFoundError,
         f"open_source: there is no list {f}/none.txt; give a text file with a path a line, or - "
         "for standard input"),
        (f"list:{f}/empty.txt", ValueError,
         f"list: expected a path a line in {f}/empty.txt, got none"),
        ("list:", ValueError, 'open_source: expected a path after "list:", got none'),
        (f"parquet:{f}/gone.parquet", FileNotFoundError,
         f"open_source: there is no manifest {f}/gone.parquet"),
        (manifest("a.parquet", file=["x"]), ValueError,
         f"parquet: expected a column path in {f}/a.parquet, got file"),
        (manifest("b.parquet", path=[1]), ValueError,
         f"parquet: expected text in the column path of {f}/b.parquet, got int64"),
        (manifest("c.parquet", path=["x"], label=[0.5]), ValueError,
         f"parquet: expected integers or text in the column label of {f}/c.parquet, got double"),
        (manifest("d.parquet", path=["x"], boxes=[[1, 2]]), ValueError,
         f"parquet: expected lists of lists of four numbers in the column boxes of {f}/d.parquet, "
         "got list<element: int64>"),
        (manifest("e.parquet", path=["x"], boxes=[[[1, 2, 3]]]), ValueError,
         f"parquet: expected four numbers a box in {f}/e.parquet, got others"),
        (manifest("g.parquet", path=["x"], boxes=[[[5, 2, 3, 4]]]), ValueError,
         "parquet: expected boxes (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1 in "
         f"{f}/g.parquet, got (5, 2, 3, 4)"),
        (manifest("h.parquet", path=["x", None]), ValueError,
         f"parquet: expected a path in every row of {f}/h.parquet, got null"),
        (manifest("i.parquet", path=pa.array([], pa.string())), ValueError,
         f"parquet: expected rows in {f}/i.parquet, got none"),
        (f"webdataset:{f}/x-{{0..1}}.tar", FileNotFoundError,
         f"webdataset: expected the shard {f}/x-0.tar, got no such file"),
        (f"webdataset:{f}/none.tar", ValueError,
         f"webdataset: expected images in {f}/none.tar, got none"),
        (f"webdataset:{f}/odd.tar", ValueError,
         f"webdataset: expected the number of a class in a.cls of {f}/odd.tar, got b'cat'"),
        ("webdataset:s3://x/y.tar", ValueError,
         "webdataset: expected tar files of this machine, got s3://x/y.tar; copy the shards first"),
        ("memory://nothing/here", FileNotFoundError,
         "open_source: expected image files in memory://nothing/here, got none"),
    ]  # fmt: skip
    for spec, kind, message in cases:
        with pytest.raises(kind) as caught:
            open_source(spec)
        assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"^parquet: expected a Parquet file, got .*xt.parquet: "):
        open_source(f"parquet:{f}/text.parquet")
    with pytest.raises(ValueError, match=r"^nobody://x: expected a protocol that fsspec knows: "):
        open_source("nobody://x")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from casm_fast.data import remote

    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as caught:
        open_source("s3://bucket/photos")
    assert str(caught.value) == (
        "s3://bucket/photos: expected fsspec to read URLs, but it is not installed: "
        "pip install 'casm_fast[remote]'"
    )


def test_images_that_are_not_in_the_set(photos: Path) -> None:
    with pytest.raises(ValueError) as caught:
        locate(FolderSource(photos), [NAMES[1], "x", "y"])
    assert str(caught.value) == (
        f"folder:{photos}: expected an image x, got none of this id (2 of 3 are missing); give the "
        "set that the table was made of"
    )


def test_the_same_boxes_from_every_source(photos: Path, shards: Path, bucket: str) -> None:
    from casm_fast.extraction import extract
    from casm_fast.models.saliency import build_model

    model = build_model("compact", classes=3, input_size=32)
    (photos / "all.txt").write_text("".join(f"{name}\n" for name in NAMES), encoding="utf-8")
    specs = [f"folder:{photos}", f"list:{photos}/all.txt", f"{photos}/**/*", bucket]
    tables = [
        extract(model, spec).table.drop(["image_id", "label"]).replace_schema_metadata()
        for spec in [*specs, f"webdataset:{shards}"]
    ]
    for table in tables[1:]:
        assert table.equals(tables[0])
