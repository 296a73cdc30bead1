"""The browsing page: what is in the file, and, where there is a Chromium, what it does."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from casm_fast.data import localization, predictions
from casm_fast.data.predictions import Convention, Description
from casm_fast.report import browse
from casm_fast.report.browsing import CHUNK, SIDE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
IMAGES = 120
EVIL = "</script><b>&'\"é"
CLASSES = ("cat", EVIL, "zebra")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes, one of them smaller than a thumbnail."""
    root = tmp_path_factory.mktemp("browse")
    rng = np.random.default_rng(0)
    for k in range(IMAGES):
        size = [(300, 150), (200, 400), (20, 30)][k % 3]
        colours = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        colours.resize(size).save(root / f"{k:03d}.jpg")
    return root


@pytest.fixture(scope="module")
def table(photos: Path) -> pa.Table:
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for k in range(IMAGES):
        width, height = [(300, 150), (200, 400), (20, 30)][k % 3]
        x0, y0 = rng.integers(0, [width // 2, height // 2]).tolist()
        box = [x0, y0, x0 + width // 3, y0 + height // 3]
        shift = int(rng.integers(0, 8))
        truth = [box[0] + shift, box[1] + shift, box[2] + shift, box[3] + shift]
        rows.append(
            {
                "image_id": f"{k:03d}.jpg", "width": width, "height": height, "label": k % 3,
                "predicted": k % 3 if k % 5 else (k + 1) % 3, "predicted_name": "",
                "score": round(float(rng.random()), 3), "mean_saliency": 0.25,
                "gt_boxes": [truth], "gt_net_boxes": [truth],
                **dict(zip(("x0", "y0", "x1", "y1"), box, strict=True)),
                **dict(zip(("net_x0", "net_y0", "net_x1", "net_y1"), box, strict=True)),
            }
        )  # fmt: skip
    rows[7] = {"image_id": "007.jpg", "label": 1, "error": f"cannot decode 007.jpg: {EVIL}"}
    empty = ("x0", "y0", "x1", "y1", "net_x0", "net_y0", "net_x1", "net_y1")
    rows[9] |= dict.fromkeys(empty, 0)
    convention = Convention(224, "squash", "mean", 1.0, "largest", 4)
    description = Description(f"folder:{photos}", convention, (56, 56), classes=CLASSES)
    plain = pa.Table.from_pylist(rows, schema=predictions.schema())
    return predictions.describe(plain, description)


@pytest.fixture(scope="module")
def page(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return browse(table, tmp_path_factory.mktemp("page") / "new" / "browse.html")


class Scripts(HTMLParser):
    """The contents of the script elements, and every attribute of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        self._open = tag == "script"
        if self._open:
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self._open:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def data(self) -> dict[str, Any]:
        (text,) = (text for attrs, text in self.scripts if attrs.get("id") == "data")
        loaded: dict[str, Any] = json.loads(text)
        return loaded

    def thumbnails(self) -> list[str]:
        chunks = [json.loads(text) for attrs, text in self.scripts if attrs.get("class") == "chunk"]
        assert all(len(chunk) == CHUNK for chunk in chunks[:-1])
        return [text for chunk in chunks for text in chunk]


def test_the_page_holds_the_table(page: Path, table: pa.Table) -> None:
    data = Scripts(page.read_text()).data()
    rows = table.to_pylist()
    assert data["classes"] == list(CLASSES)
    assert data["id"] == [row["image_id"] for row in rows]
    for name in ("label", "predicted", "error"):
        assert data[name] == [row[name] for row in rows]
    assert [value or 0 for value in data["score"]] == pytest.approx(
        [row["score"] or 0 for row in rows], abs=1e-4
    )
    for k, row in enumerate(rows):
        if row["error"] is not None:
            assert (data["box"][k], data["size"][k], data["iou"][k]) == (None, None, None)
            continue
        assert data["box"][k] == [row[name] for name in ("x0", "y0", "x1", "y1")]
        assert data["truth"][k] == row["gt_boxes"]
        assert data["size"][k] == [row["width"], row["height"]]
        net = np.array([row[f"net_{name}"] for name in ("x0", "y0", "x1", "y1")])
        overlap = localization.box_iou(net, np.array(row["gt_net_boxes"][0]))
        assert data["iou"][k] == pytest.approx(float(overlap), abs=1e-4)


def test_thumbnails_are_the_pictures(page: Path, photos: Path) -> None:
    texts = Scripts(page.read_text()).thumbnails()
    assert len(texts) == IMAGES
    assert texts[7] == ""
    sizes = [(SIDE, SIDE // 2), (SIDE // 2, SIDE), (20, 30)]
    for k, text in enumerate(texts):
        if k == 7:
            continue
        with Image.open(io.BytesIO(base64.b64decode(text))) as thumbnail:
            assert (thumbnail.format, thumbnail.size) == ("JPEG", sizes[k % 3])
            small = np.asarray(thumbnail.convert("RGB").resize((4, 4)), int)
        with Image.open(photos / f"{k:03d}.jpg") as picture:
            expected = np.asarray(picture.resize((4, 4)), int)
        assert np.abs(small - expected).mean() < 12  # 6.1 at most: chroma of a strong JPEG


def test_the_page_needs_nothing_else(page: Path) -> None:
    parsed = Scripts(page.read_text())
    assert {key for key, _ in parsed.attributes} & {
        "src",
        "href",
        "srcset",
        "data",
        "action",
    } == set()
    style = page.read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    (program,) = (text for attrs, text in parsed.scripts if not attrs)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|https?://|localStorage", program)


def test_the_same_table_gives_the_same_page(table: pa.Table, page: Path, tmp_path: Path) -> None:
    again = browse(table, tmp_path / "browse.html", workers=1)
    assert again.read_bytes() == page.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["browse.html"]


def test_a_part_at_even_distances(table: pa.Table, tmp_path: Path) -> None:
    path = browse(table, tmp_path / "x.html", limit=7)
    data = Scripts(path.read_text()).data()
    assert data["id"] == [f"{k:03d}.jpg" for k in (0, 17, 34, 51, 68, 85, 102)]
    assert "7 images at even distances; 113 others are not on this page" in path.read_text()


def test_a_file_or_folder_and_other_images(table: pa.Table, photos: Path, tmp_path: Path) -> None:
    file = predictions.write(table.slice(0, 5), tmp_path / "val.parquet")
    moved = shutil.copytree(photos, tmp_path / "moved")
    path = browse(file, tmp_path / "x.html", moved)
    assert "<title>val.parquet · 5 images</title>" in path.read_text()
    assert all(Scripts(path.read_text()).thumbnails())
    (moved / "003.jpg").write_bytes(b"")
    data = Scripts(browse(file, tmp_path / "x.html", moved).read_text()).data()
    assert data["error"][3] == f"cannot decode {moved}/003.jpg: it is empty"
    assert data["box"][3] is None


def test_refusals(table: pa.Table, tmp_path: Path) -> None:
    for name in ("limit", "side", "workers"):
        with pytest.raises(ValueError) as caught:
            browse(table, tmp_path / "x.html", **{name: 0})
        assert str(caught.value) == f"browse: expected `{name}` of at least 1, got 0"
    with pytest.raises(ValueError) as caught:
        browse(table.slice(0, 0), tmp_path / "x.html")
    assert str(caught.value) == "browse: expected a table with rows, got none"
    assert list(tmp_path.iterdir()) == []


# --- in a browser ---------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")


def run(page: Path, program: str, folder: Path, address: str = "") -> Any:
    """What a program returns that runs in the page, in a window of 900 x 700."""
    script = f"""<script>{{
    const shot = (k) => document.querySelector('.shot[data-place="' + k + '"]');
    const places = () => [...document.querySelectorAll(".shot")]
      .sort((a, b) => a.offsetTop - b.offsetTop || a.offsetLeft - b.offsetLeft)
      .map((made) => Number(made.dataset.place));
    const press = (key, target) => (target || document.activeElement || document.body)
      .dispatchEvent(new KeyboardEvent("keydown", {{ key, bubbles: true, cancelable: true }}));
    const type = (id, value) => {{
      $(id).value = value;
      $(id).dispatchEvent(new Event("input", {{ bubbles: true }}));
    }};
    const result = document.createElement("pre");
    result.id = "result";
    try {{ result.textContent = JSON.stringify((() => {{ {program} }})()); }}
    catch (error) {{ result.textContent = JSON.stringify("failed: " + error.stack); }}
    document.body.append(result);
    }}</script>"""
    copy = folder / "page.html"
    copy.write_text(page.read_text().replace("</body>", script + "</body>"))
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={folder / 'profile'}", "--window-size=900,700",
            "--dump-dom", f"{copy.as_uri()}#{address}",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(html.unescape(found[1]))


def expected_places(table: pa.Table, kept: Any, order: Any = None) -> list[int]:
    rows = list(enumerate(table.to_pylist()))
    places = [k for k, row in rows if kept(k, row)]
    return sorted(places, key=order) if order else places


@needs_chromium
def test_what_stands_in_the_address_is_shown(page: Path, table: pa.Table, tmp_path: Path) -> None:
    data = Scripts(page.read_text()).data()
    addresses = {
        "": lambda k: True,
        "class=2": lambda k: data["label"][k] == 2,
        "show=missed": lambda k: data["iou"][k] is not None and data["iou"][k] <= 0.5,
        "show=found&iou=0.6-0.8": lambda k: 0.6 <= (data["iou"][k] or 0) <= 0.8,
        "show=wrong": lambda k: data["predicted"][k] not in (None, data["label"][k]),
        "show=boxless": lambda k: k == 9,
        "show=error": lambda k: k == 7,
        "score=0.5-": lambda k: (data["score"][k] or 0) >= 0.5,
        "q=11": lambda k: "11" in data["id"][k],
        "q=nothing": lambda k: False,
    }
    program = f"""
      const found = {{}};
      for (const address of {json.dumps(list(addresses))}) {{
        location.hash = address; readAddress(); show();
        found[address] = [...shown];
      }}
      return found;
    """
    found = run(page, program, tmp_path)
    for address, kept in addresses.items():
        assert found[address] == [k for k in range(IMAGES) if kept(k)], address

    orders = {
        "sort=-score": lambda k: (data["score"][k] is None, -(data["score"][k] or 0), k),
        "sort=iou&show=missed": lambda k: (data["iou"][k], k),
        "sort=id": lambda k: data["id"][k],
    }
    program = program.replace(json.dumps(list(addresses)), json.dumps(list(orders)))
    found = run(page, program, tmp_path)
    for address, order in orders.items():
        kept = addresses["show=missed"] if "missed" in address else addresses[""]
        assert found[address] == sorted((k for k in range(IMAGES) if kept(k)), key=order)


@needs_chromium
def test_tiles_boxes_and_what_is_in_the_document(page: Path, tmp_path: Path) -> None:
    data = Scripts(page.read_text()).data()
    program = """
      const made = shot(100), photo = made.querySelector(".photo");
      const box = photo.querySelector("i.p"), truth = photo.querySelectorAll("i.t");
      const inside = made.getBoundingClientRect();
      return {
        places: places(), at: made.className, top: inside.top, bottom: inside.bottom,
        screen: window.innerHeight, width: photo.offsetWidth, height: photo.offsetHeight,
        left: box.style.left, boxWidth: box.style.width, truth: truth.length,
        dashed: getComputedStyle(truth[0]).borderTopStyle,
        solid: getComputedStyle(box).borderTopStyle,
        image: photo.querySelector("img").src.slice(0, 23), count: $("count").textContent,
        scripts: document.querySelectorAll("main b").length,
      };
    """
    found = run(page, program, tmp_path, "at=100")
    assert found["at"] == "shot at"
    assert found["top"] >= 0  # scrolled to
    assert found["bottom"] <= found["screen"]
    assert found["places"] == list(range(found["places"][0], found["places"][-1] + 1))
    assert len(found["places"]) < IMAGES  # of the others nothing is in the document
    width, height = data["size"][100]
    assert found["width"] / found["height"] == pytest.approx(width / height, rel=0.02)
    x0, _, x1, _ = data["box"][100]
    assert float(found["left"][:-1]) == pytest.approx(100 * x0 / width, abs=1e-3)
    assert float(found["boxWidth"][:-1]) == pytest.approx(100 * (x1 - x0) / width, abs=1e-3)
    assert (found["truth"], found["dashed"], found["solid"]) == (1, "dashed", "solid")
    assert found["image"] == "data:image/jpeg;base64,"
    assert found["count"] == "120 images"


@needs_chromium
def test_the_keyboard(page: Path, tmp_path: Path) -> None:
    program = """
      const seen = [];
      const note = (what) => seen.push([what, state.at, state.open, view.open,
        document.activeElement.id, document.body.className, location.hash]);
      for (const key of ["j", "ArrowRight", "k", "ArrowDown", "ArrowUp", "End", "j", "Home"]) {
        press(key); note(key);
      }
      seen.push(["columns", layout.columns]);
      press("Enter"); note("Enter"); seen.push(["title", view.querySelector("h2").textContent]);
      press("ArrowDown"); note("next"); seen.push(["title", view.querySelector("h2").textContent]);
      press("Escape"); note("Escape");
      press("b"); note("b"); press("b"); note("b again");
      press("f"); note("f");
      type("q", "00"); note("typed"); seen.push(["shown", shown.length]);
      press("j"); note("j while typing");
      press("Escape", $("q")); note("leave");
      press("Escape"); note("clear"); seen.push(["shown", shown.length]);
      type("class", "1"); type("sort", "-iou"); note("chosen"); seen.push(["shown", shown.length]);
      shot(shown[2]).click(); note("click"); seen.push(["same", state.at === shown[2]]);
      return seen;
    """
    seen = run(page, program, tmp_path)
    assert isinstance(seen, list), seen
    columns = dict(entry for entry in seen if len(entry) == 2)["columns"]
    at = {what: rest for what, *rest in seen if len(rest) > 1}
    assert [at[key][0] for key in ("ArrowRight", "k", "ArrowDown", "ArrowUp")] == [1, 0, columns, 0]
    assert [entry[1] for entry in seen[5:8]] == [IMAGES - 1, IMAGES - 1, 0]  # End, j, Home
    assert at["Enter"][:3] == [0, True, True]
    assert at["next"][:3] == [1, True, True]
    assert [entry[1] for entry in seen if entry[0] == "title"] == ["000.jpg", "001.jpg"]
    assert at["Escape"][:3] == [1, False, False]
    assert "bare" in at["b"][4].split()
    assert "bare" not in at["b again"][4].split()
    assert at["f"][3] == "q"
    assert at["j while typing"] == at["typed"]
    assert at["leave"][3] != "q"
    assert at["clear"][5] == ""
    assert [entry[1] for entry in seen if entry[0] == "shown"] == [11, IMAGES, 40]
    assert at["chosen"][5] == "#class=1&sort=-iou"
    assert at["click"][1:3] == [True, True]
    assert ["same", True] in seen


@needs_chromium
def test_names_are_text_and_never_markup(page: Path, tmp_path: Path) -> None:
    program = """
      location.hash = "show=error&at=7&open=1"; readAddress(); show();
      return [shot(7).querySelector(".broken").textContent, view.querySelector("dd").textContent,
              document.querySelectorAll("main .broken b, dialog dd b").length];
    """
    broken, label, marked = run(page, program, tmp_path)
    assert broken == f"cannot decode 007.jpg: {EVIL}"
    assert (label, marked) == (EVIL, 0)
