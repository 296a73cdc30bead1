"""Decoder and saliency model: the paper's shapes and counts, an oracle, and who trains whom."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casm_fast.models import (
    Decoder,
    SaliencyModel,
    build_encoder,
    build_model,
    full_size,
)

RESNET50 = (64, 256, 512, 1024, 2048)


def images(size: tuple[int, int] = (64, 64), batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def random_taps(channels: tuple[int, ...], sides: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, c, s, s, generator=generator) for c, s in zip(channels, sides, strict=True)
    ]


# Decoder


def test_decoder_of_resnet50_has_the_papers_parameters() -> None:
    assert sum(p.numel() for p in Decoder(RESNET50).parameters()) == 249_153


def test_projected_tap0_adds_one_convolution() -> None:
    more = 64 * 64 + 2 * 64  # 1x1 convolution and batch norm; the 3x3 convolution is as wide
    projected = Decoder(RESNET50, tap0_projection=True)
    assert sum(p.numel() for p in projected.parameters()) == 249_153 + more


def test_decoder_equals_the_paper_written_out() -> None:
    torch.manual_seed(0)
    decoder = Decoder((4, 6, 8), width=5)
    taps = random_taps((4, 6, 8), (12, 12, 3))
    batch_norms = {}
    for key, projection in decoder.projections.items():
        norm = projection[1]
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_()
        batch_norms[key] = norm
    features = [taps[0]]
    for index in (1, 2):
        weight = decoder.projections[str(index)][0].weight  # [5, C, 1, 1]
        x = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], taps[index])
        mean = x.mean((0, 2, 3), keepdim=True)
        var = x.var((0, 2, 3), unbiased=False, keepdim=True)
        norm = batch_norms[str(index)]
        x = (x - mean) / (var + 1e-5).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        features.append(F.interpolate(x.clamp(min=0), scale_factor=12 // x.shape[-1],
                                      mode="bilinear", align_corners=False))  # fmt: skip
    stacked = F.unfold(torch.cat(features, 1), 3, padding=1)  # [B, C*9, 144]
    logits = decoder.final.weight.view(1, -1) @ stacked + decoder.final.bias
    expected = 1 / (1 + torch.exp(-logits.view(2, 1, 12, 12)))
    got = decoder(taps)
    # float32 sums of 126 products in another order: 6.3e-7 at most over 20 seeds.
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)


def test_initialisation_is_the_authors() -> None:
    torch.manual_seed(0)
    decoder = Decoder(RESNET50)
    for convolution, fan_out in ((decoder.projections["4"][0], 64), (decoder.final, 9)):
        weight = convolution.weight.detach()
        expected = (2 / fan_out) ** 0.5
        assert abs(weight.std().item() / expected - 1) < 5 / (2 * weight.numel()) ** 0.5


def test_chosen_taps_keep_the_finest_resolution() -> None:
    decoder = Decoder(RESNET50, tap_indices=(3, 4))
    assert Decoder(RESNET50, tap_indices=(-2, -1)).tap_indices == decoder.tap_indices == (3, 4)
    taps = random_taps(RESNET50, (8, 8, 4, 2, 1))
    saliency = decoder(taps)
    assert saliency.shape == (2, 1, 8, 8)
    assert list(decoder.projections) == ["3", "4"]
    assert decoder.final.in_channels == 128
    for index in (0, 1, 2):
        taps[index] = torch.zeros_like(taps[index])
    assert torch.equal(saliency, decoder(taps))


@pytest.mark.parametrize("size", [(224, 224), (64, 96), (65, 97), (33, 47), (240, 31)])
@pytest.mark.parametrize("backbone", ["resnet18", "compact", "mobilenet_v3_small"])
def test_saliency_has_the_finest_taps_size(backbone: str, size: tuple[int, int]) -> None:
    model = build_model(backbone, classes=5, width=8).eval()
    with torch.no_grad():
        saliency, logits = model(images(size))
    stride = 2 if backbone == "compact" else 4
    assert saliency.shape == (2, 1, -(-size[0] // stride), -(-size[1] // stride))
    assert logits.shape == (2, 5)
    assert ((saliency >= 0) & (saliency <= 1)).all()


def test_paper_model_gives_56x56() -> None:
    model = build_model("resnet50").eval()
    with torch.no_grad():
        saliency, logits = model(images((224, 224), batch=1))
    assert saliency.shape == (1, 1, 56, 56)
    assert logits.shape == (1, 1000)
    assert model.input_size == 224
    assert sum(p.numel() for p in model.parameters()) == 25_557_032 + 249_153


# Saliency model


def test_classifier_runs_once() -> None:
    model = build_model("compact", classes=8)
    calls: list[int] = []
    model.classifier.backbone.get_submodule("conv1").register_forward_hook(
        lambda *_: calls.append(1)
    )
    model(images())
    assert calls == [1]


def test_mask_loss_never_trains_a_shared_encoder() -> None:
    model = build_model("compact", classes=8)
    saliency, logits = model(images())
    saliency.mean().backward()
    assert all(p.grad is None for p in model.classifier.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())
    logits.sum().backward()
    assert all(p.grad is not None for p in model.classifier.parameters())
    assert model.encoder is model.classifier
    assert model.shared


def test_mask_loss_trains_a_separate_encoder_only() -> None:
    model = build_model("compact", classes=8, shared=False)
    assert model.encoder is not model.classifier
    assert not model.shared
    saliency, _ = model(images())
    saliency.mean().backward()
    assert all(p.grad is None for p in model.classifier.parameters())
    trained = [p for n, p in model.encoder.named_parameters() if not n.startswith("backbone.fc")]
    assert all(p.grad is not None for p in trained)
    mapping = {id(p) for p in model.mapping_parameters()}
    assert mapping == {
        id(p) for module in (model.encoder, model.decoder) for p in module.parameters()
    }


def test_separate_encoder_starts_as_a_copy() -> None:
    model = build_model("compact", classes=8, shared=False)
    pairs = zip(
        model.classifier.state_dict().values(), model.encoder.state_dict().values(), strict=True
    )
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_separate_encoder_feeds_the_decoder() -> None:
    model = build_model("compact", classes=8, shared=False).eval()
    before, logits = model(images())
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.zero_()
    after, other_logits = model(images())
    assert torch.equal(before, after)
    assert not torch.equal(logits, other_logits)


def test_shared_state_dict_names_every_weight_once() -> None:
    model = build_model("compact", classes=8)
    names = list(model.state_dict())
    assert len(names) == len(model.classifier.state_dict()) + len(model.decoder.state_dict())
    assert "classifier.backbone.conv1.weight" in names
    assert not any(name.startswith("separate_encoder") for name in names)


def test_decode_continues_from_the_classifiers_taps() -> None:
    for shared in (True, False):
        model = build_model("compact", classes=8, shared=shared).eval()
        saliency, logits = model(images())
        again, taps = model.classifier(images())
        assert torch.equal(again, logits)
        assert torch.equal(model.decode(images(), taps), saliency)


def test_tap0_is_raw_for_resnets_and_projected_elsewhere() -> None:
    assert not build_model("resnet18", classes=5).decoder.tap0_projection
    assert not build_model("compact", classes=5).decoder.tap0_projection
    assert build_model("mobilenet_v3_small", classes=5).decoder.tap0_projection
    assert build_model("compact", classes=5, tap0_projection=True).decoder.tap0_projection


def test_class_names_count_the_logits() -> None:
    model = build_model("compact", classes=["disc", "ring", "bar"])
    assert model.classes == ("disc", "ring", "bar")
    assert model.classifier.classes == 3
    assert model.input_size == 64


def test_compiles_into_one_graph() -> None:
    model = build_model("compact", classes=8).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for got, want in zip(compiled(images()), model(images()), strict=True):
        assert torch.equal(got, want)


def test_batch_of_images_does_not_change_an_image_in_eval_mode() -> None:
    model = build_model("compact", classes=8).eval()
    together, _ = model(images(batch=3))
    alone, _ = model(images(batch=3)[1:2])
    # Convolutions of another batch size sum in another order, and the untrained decoder's sharp
    # sigmoid amplifies it: 2.5e-5 at most over 20 seeds.
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=2e-4)
    empty, logits = model(images(batch=0))
    assert empty.shape == (0, 1, 32, 32)
    assert logits.shape == (0, 8)


# Full size


@pytest.mark.parametrize("size", [(56, 56), (224, 224), (57, 100), (61, 223)])
def test_full_size_equals_a_loop(size: tuple[int, int]) -> None:
    saliency = torch.rand(2, 1, 56, 50)
    full = full_size(saliency, size)
    assert full.shape == (2, 1, *size)
    for y in range(0, size[0], 3):
        for x in range(0, size[1], 3):
            assert torch.equal(full[:, :, y, x],
                               saliency[:, :, y * 56 // size[0], x * 50 // size[1]])  # fmt: skip


def test_full_size_of_whole_factors_is_nearest_interpolation() -> None:
    saliency = torch.rand(2, 1, 56, 56)
    assert torch.equal(full_size(saliency, (224, 224)), F.interpolate(saliency, scale_factor=4))


def test_full_size_is_differentiable() -> None:
    saliency = torch.rand(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: full_size(s, (7, 9)), (saliency,))


# Errors


def model_of(**options: object) -> SaliencyModel:
    classifier = build_encoder("compact", classes=8)
    return SaliencyModel(classifier, Decoder(classifier.tap_channels), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Decoder((4, 4), tap_indices=(1, 2)),
            "Decoder: expected `tap_indices` to be rising indices of 2 taps (0 to 1), got [1, 2]",
        ),
        (
            lambda: Decoder((4, 4), tap_indices=()),
            "Decoder: expected `tap_indices` to be rising indices of 2 taps (0 to 1), got []",
        ),
        (
            lambda: Decoder((4, 4), tap_indices=(1, 0)),
            "Decoder: expected `tap_indices` to be rising indices of 2 taps (0 to 1), got [1, 0]",
        ),
        (
            lambda: Decoder((4, 4), width=0),
            "Decoder: expected `width` of at least 1, got 0",
        ),
        (
            lambda: Decoder((4, 4))([torch.zeros(1, 4, 2, 2)]),
            "Decoder: expected 2 taps, got 1",
        ),
        (
            lambda: model_of(classes=["a", "b"]),
            "SaliencyModel: expected 8 class names, one per logit, got 2",
        ),
        (
            lambda: SaliencyModel(build_encoder("compact", classes=8), Decoder((4, 4))),
            "SaliencyModel: expected a decoder for taps of [16, 16, 32, 64, 128] channels, got one "
            "for [4, 4]",
        ),
        (
            lambda: model_of(input_size=0),
            "SaliencyModel: expected `input_size` of at least 1, got 0",
        ),
        (
            lambda: model_of(resize_policy="stretch"),
            "SaliencyModel: expected `resize_policy` 'crop' or 'squash', got 'stretch'",
        ),
        (
            lambda: model_of(std=(1.0, 1.0, 0.0)),
            "SaliencyModel: expected `mean` and `std` of three channels with `std` above 0, got "
            "[0.485, 0.456, 0.406] and [1.0, 1.0, 0.0]",
        ),
        (
            lambda: full_size(torch.zeros(1, 1, 8, 8), (8, 7)),
            "full_size: expected `size` of at least 8x8, got 8x7",
        ),
    ],
)
def test_errors(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_train_and_eval_reach_every_part() -> None:
    model = build_model("mobilenet_v3_small", classes=5, shared=False)
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
    assert isinstance(model.decoder.final, nn.Conv2d)
