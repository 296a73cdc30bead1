"""The embedded set: determinism, exact boxes and masks, difficulty, and its tree of files."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from casm_fast.data import centred_box, iou, localisation_error
from casm_fast.data.drawing import SHAPES, colour
from casm_fast.data.synthetic import class_names, generate, open_synthetic, wnid, write_tree


@pytest.fixture(scope="module")
def val():
    return generate(1000, split="val")


def test_default_set_has_the_documented_form(val):
    assert val.images.shape == (1000, 64, 64, 3)
    assert val.images.dtype == np.uint8
    assert val.masks.shape == (1000, 64, 64)
    assert val.name == "synthetic:val"
    assert val.has_boxes
    assert val.image_id(17) == "val-000017"
    assert len(val.classes) == len(set(val.classes)) == 8
    assert np.bincount(val.labels).min() >= 1000 // 8 - 8  # balanced within blocks of 128


def test_same_arguments_same_pictures_for_any_number_of_workers():
    first, second = generate(200, seed=5, workers=1), generate(200, seed=5, workers=3)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.box_table, second.box_table)
    np.testing.assert_array_equal(first.masks, second.masks)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31))
def test_a_larger_set_begins_with_a_smaller_one(count, seed):
    small, large = generate(count, 16, seed=seed), generate(300, 16, seed=seed)
    np.testing.assert_array_equal(small.images, large.images[:count])
    np.testing.assert_array_equal(small.labels, large.labels[:count])
    np.testing.assert_array_equal(small.box_starts, large.box_starts[: count + 1])


def test_splits_and_seeds_share_no_picture(val):
    train = generate(4000)
    other = generate(500, seed=1, split="val")
    seen = [picture.tobytes() for s in (train, val, other) for picture in s.images]
    assert len(set(seen)) == len(seen) == 5500


def test_boxes_are_the_extents_of_the_parts_of_the_mask(val):
    # Objects keep apart, so every part that SciPy's labelling of the union finds lies in one box.
    # (The tip of a star may be a part of its own: its neck is thinner than a pixel.)
    several = 0
    for index in range(300):
        parts = ndimage.find_objects(ndimage.label(val.masks[index], np.ones((3, 3)))[0])
        found = np.array([(x.start, y.start, x.stop, y.stop) for y, x in parts])
        boxes = val.boxes(index)
        several += len(boxes) > 1
        inside = (found[None, :, :2] >= boxes[:, None, :2]).all(-1)
        inside &= (found[None, :, 2:] <= boxes[:, None, 2:]).all(-1)
        assert inside.any(0).all()
        for box, own in zip(boxes, inside, strict=True):
            assert (found[own, :2].min(0) == box[:2]).all()
            assert (found[own, 2:].max(0) == box[2:]).all()
    assert 30 < several < 120


def test_objects_are_where_the_mask_says():
    # Inside the mask two colours of different lightness alternate, outside there is soft ground:
    # neighbouring pixels differ more inside.
    source = generate(200, seed=2)
    grey = source.images.astype(np.float64).mean(-1)
    step = np.abs(np.diff(grey, axis=2))[:, :-1] + np.abs(np.diff(grey, axis=1))[:, :, :-1]
    inside = source.masks[:, :-1, :-1]
    ratio = [step[i][inside[i]].mean() / step[i][~inside[i]].mean() for i in range(len(source))]
    assert np.mean(np.array(ratio) > 1) > 0.97


def test_a_centred_box_fails_as_often_as_documented(val):
    truth = [val.boxes(index) for index in range(len(val))]
    error = localisation_error(iou(np.tile(centred_box(64), (len(val), 1)), truth))
    assert 0.73 < error < 0.83  # measured 0.78
    whole = localisation_error(iou(np.tile([0, 0, 64, 64], (len(val), 1)), truth))
    assert whole > 0.9


def test_mean_colour_says_nothing_about_the_class(val):
    # A nearest-class-mean rule on the mean colour, fitted on one half, is at chance on the other.
    features = val.images.reshape(1000, -1, 3).mean(1)
    means = np.stack([features[:500][val.labels[:500] == k].mean(0) for k in range(8)])
    guess = ((features[500:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guess == val.labels[500:]).mean() < 0.125 + 0.06


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("disc", np.pi * 0.88**2),
        ("square", 1.56**2),
        ("triangle", 3 * 3**0.5 * 0.56**2),
        ("capsule", np.pi * 0.26**2 + 1.4 * 0.52),
        ("ring", np.pi * (0.9**2 - 0.54**2)),
        ("cross", 2 * 1.9 * 0.72 - 0.72**2),
        ("lens", 2 * (1.44 * np.arccos(0.625) - 0.75 * (1.44 - 0.5625) ** 0.5)),
    ],
)
def test_shape_areas_equal_their_formulas(shape, area):
    axis = ((np.arange(800) + 0.5) / 400 - 1).astype(np.float32) * np.float32(1.3)
    u, v = np.meshgrid(axis, axis)
    distance = SHAPES[shape](u, v)
    assert distance.dtype == np.float32
    assert (distance < 0).mean() * 2.6**2 == pytest.approx(area, rel=5e-3)


def test_every_shape_fits_its_radius():
    axis = ((np.arange(400) + 0.5) / 200 - 1).astype(np.float32) * 2
    u, v = np.meshgrid(axis, axis)
    for name, shape in SHAPES.items():
        inside = shape(u, v) < 0
        assert inside.any(), name
        assert np.hypot(u, v)[inside].max() < 1.15, name


def test_colour_agrees_with_known_values():
    # Ottosson's table: sRGB red, white, and black in OKLCH.
    got = colour(
        np.array([0.627955, 1.0, 0.0]), np.array([0.257683, 0.0, 0.0]), np.array([0.510228, 0, 0])
    )
    np.testing.assert_allclose(got, [[1, 0, 0], [1, 1, 1], [0, 0, 0]], atol=2e-3)


def test_class_names_are_pairs_without_repetition():
    names = class_names(32)
    assert len(set(names)) == 32
    assert class_names(8) == names[:8]
    textures = [name.split()[0] for name in names[:8]]
    assert sorted(textures.count(t) for t in set(textures)) == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 0}, "synthetic: expected `images` of at least 1, got 0"),
        ({"images": 4, "size": 8}, "synthetic: expected `size` of at least 16, got 8"),
        ({"images": 4, "seed": -1}, "synthetic: expected `seed` of at least 0, got -1"),
        ({"images": 4, "classes": 33}, "synthetic: expected `classes` from 2 to 32, got 33"),
        (
            {"images": 4, "emblem": 101},
            "synthetic: expected `emblem` from 0 to 100 (percent of the pictures), got 101",
        ),
        (
            {"images": 4, "split": "test"},
            'synthetic: expected `split` "train" or "val", got \'test\'',
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError) as caught:
        generate(**arguments)
    assert str(caught.value) == message


def test_specs_name_what_they_open():
    source = open_synthetic("seed=3, images=40, size=32, classes=16", "val")
    assert source.images.shape == (40, 32, 32, 3)
    assert len(source.classes) == 16
    again = open_synthetic(source.name.partition(":")[2], "train")
    np.testing.assert_array_equal(source.images, again.images)
    assert again.split == "val"
    with pytest.raises(ValueError) as caught:
        open_synthetic("image=40", "val")
    assert str(caught.value) == (
        "synthetic: expected options among train, val, images=N, size=N, classes=N, seed=N, "
        "emblem=N, got 'image=40'"
    )


# --- emblems: redundant evidence ----------------------------------------------------------------


@pytest.fixture(scope="module")
def marked():
    return generate(600, split="val", emblem=100)


def test_emblems_lie_on_top_of_the_plain_scenes(val, marked):
    np.testing.assert_array_equal(marked.labels, val.labels[:600])
    np.testing.assert_array_equal(marked.masks, val.masks[:600])
    np.testing.assert_array_equal(marked.box_table, val.box_table[: val.box_starts[600]])
    changed = (marked.images != val.images[:600]).any(-1)
    # Emblem and shadow end at (0.88 + 0.35) / 0.88 of the emblem's radius, at most 6.5 pixels.
    near = ndimage.binary_dilation(marked.emblem_masks, np.ones((1, 7, 7)))
    assert not (changed & ~near).any()
    assert changed[marked.emblem_masks].mean() > 0.99
    assert not val.emblem_masks.any()


def test_every_object_wears_one_emblem_inside_it(marked):
    assert not (marked.emblem_masks & ~marked.masks).any()
    for index in range(200):
        count = ndimage.label(marked.emblem_masks[index], np.ones((3, 3)))[1]
        assert count == len(marked.boxes(index))
    # Areas in pixels: an emblem is a disc of 0.88 * 0.30 of its object's radius.
    radius = marked.items.radius[:, 3:6] * marked.items.present[:, 3:6] * 64
    expected = (np.pi * (0.88 * 0.30 * radius) ** 2).sum()
    assert marked.emblem_masks.sum() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("emblem", "least", "most"), [(100, 0.97, 1.0), (60, 0.55, 0.75), (0, 0.05, 0.2)]
)
def test_the_emblem_alone_names_the_class_as_often_as_asked(marked, emblem, least, most):
    # The rule knows nothing of shapes: nearest class mean of the emblem's hue, as a unit vector.
    def hues(source, rows):
        worn = source.emblem_masks[rows, ..., None]
        red, green, blue = (source.images[rows] * worn).sum((1, 2)).T.astype(np.float64)
        hue = np.stack([red - (green + blue) / 2, (green - blue) * 0.75**0.5], axis=1)
        return hue / np.linalg.norm(hue, axis=1, keepdims=True)

    known, new = hues(marked, slice(300, 600)), generate(300, split="val", emblem=emblem)
    means = np.stack([known[marked.labels[300:] == k].mean(0) for k in range(8)])
    guess = ((hues(new, slice(None))[:, None] - means) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(new.labels, marked.labels[:300])
    assert least <= (guess == new.labels).mean() <= most


def test_without_its_emblem_the_colour_says_nothing_about_the_class(marked):
    rest = ~marked.emblem_masks[..., None]
    rest &= ~ndimage.binary_dilation(marked.emblem_masks, np.ones((1, 5, 5)))[..., None]
    features = (marked.images * rest).sum((1, 2)) / rest.sum((1, 2))
    means = np.stack([features[:300][marked.labels[:300] == k].mean(0) for k in range(8)])
    guess = ((features[300:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guess == marked.labels[300:]).mean() < 0.125 + 0.07


def test_emblem_specs_open_the_same_set_again_and_travel_into_trees(tmp_path, marked):
    source = open_synthetic("emblem=100,images=20", "val")
    assert source.name == "synthetic:val,images=20,emblem=100"
    np.testing.assert_array_equal(source.images, marked.images[:20])
    np.testing.assert_array_equal(source.emblem_masks, marked.emblem_masks[:20])
    plain = open_synthetic("images=20", "val")
    for name, scenes in (("marked", source), ("plain", plain)):
        write_tree(tmp_path / name, None, scenes, sides=(64, 64), aspect=1.0, quality=100)
    for index in range(20):
        file = f"val/{wnid(source.label(index))}/ILSVRC2012_val_{index + 1:08d}.JPEG"
        pictures = [np.asarray(Image.open(tmp_path / name / file)) for name in ("marked", "plain")]
        assert np.abs(pictures[0].astype(int) - source.images[index]).mean() < 4
        difference = np.abs(pictures[0].astype(int) - pictures[1]).sum(-1)
        assert difference[source.emblem_masks[index]].mean() > 60


# --- the tree -------------------------------------------------------------------------------------


def test_tree_boxes_are_exact_at_every_size(tmp_path, val):
    source = generate(24, split="val", seed=4)
    write_tree(tmp_path, None, source, sides=(120, 200), aspect=1.8, quality=100)
    sizes = set()
    for index in range(24):
        stem = f"ILSVRC2012_val_{index + 1:08d}"
        path = tmp_path / "val" / wnid(source.label(index)) / f"{stem}.JPEG"
        image = Image.open(path)
        sizes.add(image.size)
        root = ElementTree.parse(tmp_path / f"Annotations/CLS-LOC/val/{stem}.xml").getroot()
        assert (int(root.findtext("size/width")), int(root.findtext("size/height"))) == image.size
        tags = ("xmin", "ymin", "xmax", "ymax")
        boxes = np.array(
            [[int(o.findtext(f"bndbox/{t}")) for t in tags] for o in root.iter("object")]
        )
        assert {o.findtext("name") for o in root.iter("object")} == {wnid(source.label(index))}
        # The square of the scene is one shorter side wide, so the sizes of the boxes scale with it.
        side = min(image.size)
        small = source.boxes(index) * side / 64
        np.testing.assert_allclose(
            boxes[:, 2:] - boxes[:, :2], small[:, 2:] - small[:, :2], atol=2 * side / 64 + 2
        )
        # And the offset is the same for all of a picture's boxes: along the longer side only.
        shift = (boxes - small)[:, :2]
        axis = 1 if image.size[0] >= image.size[1] else 0
        assert np.abs(shift[:, axis]).max() <= 2 * side / 64 + 1
    assert len(sizes) > 15
    assert min(w / h for w, h in sizes) < 1 < max(w / h for w, h in sizes)


def test_tree_layouts(tmp_path):
    train, val = generate(16, seed=1), generate(12, seed=1, split="val")
    write_tree(tmp_path / "a", train, val, sides=(40, 60))
    write_tree(tmp_path / "b", None, val, layout="flat", annotations="annotations", sides=(40, 60))
    write_tree(tmp_path / "c", train, val, layout="kaggle", sides=(40, 60))
    assert len(list((tmp_path / "a/train").glob("n*/*.JPEG"))) == 16
    assert len(list((tmp_path / "a/val").glob("n*/*.JPEG"))) == 12
    assert len(list((tmp_path / "b/val").glob("*.JPEG"))) == 12
    assert len(list((tmp_path / "b/annotations").glob("*.xml"))) == 12
    assert len(list((tmp_path / "c/ILSVRC/Data/CLS-LOC/val").glob("*.JPEG"))) == 12
    assert len(list((tmp_path / "c/ILSVRC/Annotations/CLS-LOC/val").glob("*.xml"))) == 12
    assert (tmp_path / "c/LOC_val_solution.csv").read_text().splitlines()[0] == (
        "ImageId,PredictionString"
    )
    mapping = (tmp_path / "a/LOC_synset_mapping.txt").read_text().splitlines()
    assert mapping[0] == "n90000000 striped disc"
    # Sizes depend on the seed, not on the layout.
    assert (tmp_path / "a/val/n90000000").exists()
    one = next((tmp_path / "b/val").glob("*.JPEG"))
    assert one.read_bytes() == next((tmp_path / "a/val").glob(f"*/{one.name}")).read_bytes()


def test_tree_oddities(tmp_path):
    source = generate(10, split="val")
    write_tree(tmp_path / "grey", None, source, sides=(40, 60), greyscale=1.0)
    write_tree(tmp_path / "turned", None, source, sides=(40, 60), rotated=1.0)
    write_tree(tmp_path / "plain", None, source, sides=(40, 60))
    for path in sorted((tmp_path / "plain/val").glob("*/*.JPEG")):
        name = path.relative_to(tmp_path / "plain")
        plain, turned = Image.open(path), Image.open(tmp_path / "turned" / name)
        assert Image.open(tmp_path / "grey" / name).mode == "L"
        assert turned.getexif()[0x0112] == 6
        assert turned.size == plain.size[::-1]
        upright = np.asarray(turned.rotate(-90, expand=True)).astype(int)
        assert np.abs(upright - np.asarray(plain)).mean() < 6  # two JPEG encodings of one picture


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"layout": "tar"},
            'write_tree: expected `layout` "folders", "flat" or "kaggle", got \'tar\'',
        ),
        (
            {"sides": (50, 40)},
            "write_tree: expected `sides` of 16 <= least <= largest, got (50, 40)",
        ),
        ({"aspect": 0.5}, "write_tree: expected `aspect` of at least 1, got 0.5"),
    ],
)
def test_tree_refuses_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError) as caught:
        write_tree(tmp_path, None, None, **arguments)
    assert str(caught.value) == message
