"""The report: nothing from outside, nothing left out, and pictures that show what they say."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from casm_fast.data import predictions
from casm_fast.data.predictions import Convention
from casm_fast.data.synthetic import generate, write_tree
from casm_fast.evaluation import evaluate
from casm_fast.extraction import Extraction, extract
from casm_fast.models import checkpoint
from casm_fast.models.saliency import SaliencyModel, build_model
from casm_fast.report import charts, gallery, pictures, report
from casm_fast.report.page import _place, verdict

LOG = [
    {"phase": "pretrain", "split": "train", "step": 5, "loss": 2.0, "accuracy": 0.1},
    *(
        {"phase": "casm", "split": "train", "step": s, "mean_saliency": 0.5, "entropy": s / 10}
        for s in (5, 10, 15)
    ),
    *(
        {"phase": "casm", "split": "val", "step": s, "accuracy": 0.9, "masked_accuracy": 0.2}
        for s in (8, 16)
    ),
]


class Page(HTMLParser):
    """Tags that are open, everything that is referred to, and all text."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and value
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a model and a log, and a tree of pictures."""
    folder = tmp_path_factory.mktemp("report")
    val = generate(16, size=32, classes=3, seed=4)
    write_tree(folder / "tree", None, val, layout="flat")
    torch.manual_seed(0)
    model = build_model("compact", classes=["a", "b", "c"], input_size=32)
    checkpoint.save(model, folder / "run" / "model.safetensors")
    lines = [json.dumps(record) for record in LOG]
    (folder / "run" / "log.jsonl").write_text("\n".join(lines) + '\n{"phase": "ca')
    return folder


@pytest.fixture(scope="module")
def extraction(folder: Path) -> Extraction:
    return extract(folder / "run", f"imagenet-val:{folder / 'tree'}", folder / "boxes.parquet")


@pytest.fixture(scope="module")
def html(folder: Path, extraction: Extraction) -> str:
    page = report(
        extraction, evaluate(extraction), folder / "a" / "page.html", run=folder / "run", columns=4
    )
    assert [entry.name for entry in page.parent.iterdir()] == ["page.html"]
    return page.read_text()


def test_the_page_is_whole_and_needs_nothing_else(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    # Two groups of four in five forms, and the four best and worst in two.
    assert sum(source.startswith("data:image/jpeg;base64,") for source in page.sources) == 56
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []


def test_the_page_says_what_the_scores_say(html: str, extraction: Extraction) -> None:
    scores, text = evaluate(extraction), Page(html).text
    assert scores.localisation is not None
    for entry in (scores.localisation, *scores.baselines):
        assert entry.name.capitalize() in text
        for share in (entry.le, entry.f1, entry.coverage):
            assert f"{100 * share:.1f} %" in text
    for part in (
        "What the map marks",
        "The best and the worst",
        "Overlap with the true box",
        "Accuracy while the mask learns",
        "Entropy on masked-out images",
        "m >= mean(m) (rule mean, alpha 1)",
        "16 of 16 counted, none left out",
        extraction.description.model[:16],
        f"torch {torch.__version__}",
        "Published figures are left out",
    ):
        assert part in text


def test_names_are_text_not_markup(folder: Path, extraction: Extraction) -> None:
    names = pa.array(["<i>x & y</i>"] * 16)
    place = extraction.table.schema.get_field_index("predicted_name")
    table = extraction.table.set_column(place, "predicted_name", names)
    html = report(table, evaluate(table), folder / "names.html", columns=2).read_text()
    assert "<i>x" not in html
    assert "&lt;i&gt;x &amp; y&lt;/i&gt;" in html


def test_the_same_input_gives_the_same_page(
    folder: Path, extraction: Extraction, html: str
) -> None:
    scores = evaluate(extraction, json=folder / "scores.json")
    again = report(
        folder / "boxes.parquet",
        folder / "scores.json",
        folder / "again.html",
        run=folder / "run",
        columns=4,
    )
    assert again.read_text() == html
    third = report(extraction.table, scores.to_dict(), folder / "third.html", columns=2)
    assert "Accuracy while the mask learns" not in third.read_text()


def test_without_true_boxes_the_page_shows_pictures(tmp_path: Path) -> None:
    model = build_model("compact", classes=3, input_size=32)
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    made = extract(model, f"folder:{tmp_path}")
    page = Page(report(made, evaluate(made), tmp_path / "page.html", model=model).read_text())
    assert page.open == []
    assert "5 images have a box; none has a true box to score it with." in page.text
    assert "Against boxes that look at nothing" not in page.text
    assert "1 unreadable" in page.text
    assert sum(source.startswith("data:") for source in page.sources) == 25


def test_without_opencv_the_inpainted_row_is_explained(
    folder: Path, extraction: Extraction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    page = Page(report(extraction, evaluate(extraction), folder / "no-cv2.html").read_text())
    assert "it needs OpenCV (pip install 'casm_fast[inpaint]')." in page.text
    assert "the hole, filled from its surroundings" not in page.text


@pytest.mark.parametrize(
    ("rule", "alpha"),
    [("mean", 1.0), ("mean", 0.5), ("area", 1.0), ("value", 0.5), ("energy", 0.9), ("mean", 9.0)],
)
def test_the_threshold_of_the_pictures_is_that_of_the_boxes(rule: str, alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    saliency = (torch.rand(4, 1, 9, 7, generator=generator) * 8).round() / 8
    found = pictures.threshold(saliency, Convention(28, "crop", rule, alpha, "largest", 4)).numpy()
    for m, kept in zip(saliency.numpy().astype(np.float64), found, strict=True):
        ranked = np.sort(m.ravel())
        if rule == "mean":
            expected = m >= alpha * m.mean()
        elif rule == "area":
            expected = m > ranked[int((m.size - 1) * (1 - m.mean()) + 0.5)]
        elif rule == "value":
            expected = m >= m.min() + alpha * (m.max() - m.min())
        else:
            levels = [v for v in ranked if m[m >= v].sum() >= alpha * m.sum()]
            expected = m >= max(levels)
        np.testing.assert_array_equal(kept, expected)


def test_the_forms_of_a_picture() -> None:
    class Half(SaliencyModel):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            saliency, logits = super().forward(images)
            saliency = torch.zeros_like(saliency)
            saliency[..., : saliency.shape[3] // 2] = 0.8
            return saliency, logits

    plain = build_model("compact", classes=3, input_size=32)
    model = Half(plain.classifier, plain.decoder, input_size=32).eval()
    source = generate(2, size=32, classes=3)
    convention = Convention(32, "crop", "mean", 1.0, "largest", 4)
    drawn = pictures.draw(model, source, [1, 0], convention)
    assert pictures.draw(model, source, [], convention) == []
    for index, picture in zip((1, 0), drawn, strict=True):
        original = np.asarray(
            Image.fromarray(source.image(index)).resize((192, 192), Image.Resampling.BILINEAR)
        )
        np.testing.assert_array_equal(picture.original, original)
        np.testing.assert_array_equal(picture.masked_in[:, :96], original[:, :96])
        np.testing.assert_array_equal(picture.masked_out[:, 96:], original[:, 96:])
        assert (picture.masked_in[:, 96:] == 89).all()
        assert (picture.masked_out[:, :96] == 89).all()
        hole = np.zeros((32, 32), np.uint8)
        hole[:, :16] = 1
        repaired = cv2.inpaint(source.image(index), hole, 3, cv2.INPAINT_TELEA)
        repaired = np.asarray(
            Image.fromarray(repaired).resize((192, 192), Image.Resampling.BILINEAR)
        )
        assert picture.inpainted is not None
        np.testing.assert_array_equal(picture.inpainted[:, :96], repaired[:, :96])
        np.testing.assert_array_equal(picture.inpainted[:, 96:], original[:, 96:])
        dark, bright = picture.saliency[:, 96:].mean(), picture.saliency[:, :96].mean()
        assert bright > dark + 30


def test_the_gallery_on_its_own(folder: Path, extraction: Extraction) -> None:
    file = gallery(extraction, folder / "pictures" / "gallery.png", columns=4, dpi=100)
    with Image.open(file) as image:
        width, height = image.size
        pixels = np.asarray(image.convert("RGB"))
    assert (width, height) == (round(100 * (0.95 + 4 * 1.3)), 650)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 5000


def test_charts_take_their_colours_from_the_page() -> None:
    made = charts.training_charts(LOG)
    assert [chart.title for chart in made] == [
        "Accuracy while the mask learns",
        "Size of the mask",
        "Entropy on masked-out images",
    ]
    for chart in made:
        assert chart.svg.startswith("<svg")
        assert "var(--accent)" in chart.svg
        assert not re.search(r"#0[1-5]0[1-5]0[1-5]|font-family|<metadata| width=", chart.svg[:4000])
    assert "var(--second)" in made[0].svg
    assert charts.training_charts(LOG[:1]) == []


def test_a_log_that_a_crash_cut_short_is_read(folder: Path) -> None:
    assert charts.read_log(folder / "run" / "log.jsonl") == LOG


@pytest.mark.parametrize(
    ("ours", "centre", "sentence"),
    [
        (0.09, 0.78, "The box finds the object in 91 of 100 images, "
         "where one in the middle of the picture finds 22."),
        (0.8, 0.78, "The box finds the object in 20 of 100 images, "
         "no better than one in the middle of the picture (22)."),
    ],
)  # fmt: skip
def test_the_verdict(ours: float, centre: float, sentence: str) -> None:
    scores: dict[str, Any] = {
        "localisation": {"le": ours},
        "baselines": [{"name": "centred box", "le": centre}],
    }
    assert verdict(scores) == sentence


def test_what_cannot_be_reported_is_refused(folder: Path, extraction: Extraction) -> None:
    scores = evaluate(extraction)
    row = extraction.table.slice(0, 1).to_pylist()[0]
    with pytest.raises(
        ValueError, match=r"^report: expected image '.*' at position 0 of synthetic"
    ) as e:
        report(extraction, scores, folder / "x.html", source="synthetic:images=2")
    assert str(e.value).endswith("give the images that the boxes were made from")
    assert row["image_id"] in str(e.value)

    unnamed = predictions.describe(
        extraction.table,
        predictions.Description("x", extraction.description.convention, (8, 8)),
    )
    message = "report: expected `model`, because the table was made by a model in memory, got None"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        report(unnamed, scores, folder / "x.html")
    missing, tree = folder / "none.json", folder / "tree"
    for arguments, message in (
        (
            {"scores": missing},
            f"expected the JSON file of an evaluation, got {missing}: no such file",
        ),
        (
            {"scores": scores, "run": tree},
            f"report: expected the folder of a training run, got {tree}: no log.jsonl",
        ),
    ):
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
            report(extraction, output=folder / "x.html", **arguments)
    assert not (folder / "x.html").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("synthetic:val,seed=3", "of the embedded synthetic set"),
        ("imagenet-val:/data/ILSVRC", "from ILSVRC (ImageNet layout)"),
        ("coco-val2017:/data/coco", "from coco"),
        ("voc-test2007:/data/pascal", "from pascal"),
        ("wsol:/data/metadata/CUB/test,images=/a/b,proxy", "from CUB/test"),
        ("wsol:metadata/CUB/test", "from CUB/test"),
        ("/data/photo.jpg", "from photo.jpg"),
    ],
)
def test_the_page_says_where_images_come_from(source: str, words: str) -> None:
    assert _place(source) == words
