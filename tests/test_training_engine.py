"""Steps of the engine against a slow, literal transcription of Algorithm 1 in plain PyTorch."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casm_fast.models.decoder import Decoder
from casm_fast.models.encoder import Encoder
from casm_fast.models.saliency import SaliencyModel
from casm_fast.training.calibration import INTEGRAL, PROPORTIONAL
from casm_fast.training.config import TrainConfig
from casm_fast.training.engine import Engine, pretrain_schedule

CLASSES = 3
CPU = torch.device("cpu")


class TinyEncoder(Encoder):
    """Two convolutions, two taps."""

    def __init__(self) -> None:
        backbone = nn.ModuleDict(
            {
                "first": nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Tanh()),
                "second": nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Tanh()),
                "head": nn.Linear(6, CLASSES),
            }
        )
        super().__init__(
            backbone,
            name="tiny",
            classes=CLASSES,
            tap_channels=(4, 6),
            tap_strides=(2, 4),
            has_stem_tap=True,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        first = self.backbone["first"](images)
        second = self.backbone["second"](first)
        return self.backbone["head"](second.mean((2, 3))), (first, second)


def tiny_model(shared: bool = True) -> SaliencyModel:
    torch.manual_seed(1)
    classifier = TinyEncoder()
    separate = None if shared else TinyEncoder()
    decoder = Decoder((4, 6), width=4)
    with torch.no_grad():
        # Masks with contrast, and predictions that they can change.
        decoder.final.weight.mul_(8)
        classifier.backbone["head"].bias.zero_()
        for module in classifier.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(3)
    return SaliencyModel(classifier, decoder, separate, input_size=8).double()


def batches(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(24, 3, size, size, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (24,), generator=generator),
        )
        for _ in range(count)
    ]


def config(**fields: Any) -> TrainConfig:
    # Large rates, so that five steps change the weights far more than the tolerance.
    defaults = {
        "classifier_lr": 0.1,
        "decoder_lr": 0.01,
        "lambda_r": 1.5,
        "history_size": 2,
        "pretrain_epochs": 0,
        "masked_statistics": True,
    }
    return TrainConfig(**{**defaults, **fields})


def run(engine: Engine, data: list[tuple[Tensor, Tensor]]) -> None:
    engine.begin("casm")
    for index, (images, labels) in enumerate(data):
        engine.step(images, labels, index, len(data), 0)


def transcription(
    model: SaliencyModel, settings: TrainConfig, data: list[tuple[Tensor, Tensor]]
) -> dict[str, int]:
    """Algorithm 1, line by line: deep copies for snapshots, `backward` for every gradient.

    Returns how often each kind of event happened, to tell that something was tested.
    """
    name, f, decoder = str(settings.strategy), model.classifier, model.decoder
    encoder = model.encoder
    sgd = torch.optim.SGD(f.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    mapping = list(decoder.parameters()) + ([] if encoder is f else list(encoder.parameters()))
    adam = torch.optim.Adam(mapping, lr=0.01, weight_decay=1e-4)
    draws = torch.Generator().manual_seed(settings.seed)
    kept: list[Encoder] = []
    events = {"history": 0, "live": 0, "confused": 0, "right": 0, "overwritten": 0, "recognised": 0}
    model.train()
    f.train(name != "F")

    def judged(judge: Encoder, images: Tensor) -> Tensor:
        """Logits through a copy, whose weights and statistics nobody keeps."""
        judge = copy.deepcopy(judge)
        return judge(images)[0]

    for k, (x, y) in enumerate(data):
        # F(k), thinned
        due = k == 0 if name == "FL" else name[1:].isdigit() and k % int(name[1:]) == 0
        if due:
            snapshot = copy.deepcopy(f).eval()
            if len(kept) < (1 if name == "FL" else settings.history_size):
                kept.append(snapshot)
            else:
                events["overwritten"] += 1
                kept[int(torch.randint(settings.history_size, (), generator=draws))] = snapshot
        # f' ~ F(k)
        drawn = None
        if kept and float(torch.rand((), generator=draws, dtype=torch.float64)) < 0.5:
            drawn = kept[int(torch.randint(len(kept), (), generator=draws))]
        events["live" if drawn is None else "history"] += 1

        logits, taps = f(x)
        right = logits.argmax(1) == y
        taps = tuple(tap.detach().clone() for tap in taps)

        def mask(images: Tensor = x, taps: tuple[Tensor, ...] = taps) -> Tensor:
            if encoder is not f:
                _, taps = encoder(images)
            return decoder(taps)

        if settings.classifier_update == "alternating" and name != "F":
            sgd.zero_grad()
            F.cross_entropy(logits, y).backward()
            sgd.step()
        m = mask()
        masked = x * (1 - F.interpolate(m, x.shape[-2:], mode="nearest"))

        # Gradient of -S(m, f') for the mapping.
        out = judged(f if drawn is None else drawn, masked)
        entropy = -(out.softmax(1) * out.log_softmax(1)).sum(1)
        confused = right & (out.argmax(1) != y)
        events["confused"] += int(confused.sum())
        events["right"] += int((right & ~confused).sum())
        area = settings.lambda_r * (confused * m.mean((1, 2, 3))).sum() / len(y)
        kinds = [masked]
        if settings.score == "entropy":
            objective = -(entropy * right).sum() / len(y) + area
        else:
            objective = -F.cross_entropy(out, y) + area
        if settings.objective == "masked_in_out":
            large = F.interpolate(m, x.shape[-2:], mode="nearest")
            kinds.append(x * large)
            inside = judged(f if drawn is None else drawn, kinds[1])
            recognised = inside.argmax(1) == y
            events["recognised"] += int(recognised.sum())
            dy, dx = large.diff(dim=2), large.diff(dim=3)
            edges = [large[:, :, 0], large[:, :, -1], large[..., 0], large[..., -1]]
            rough = (dy**2).sum() + (dx**2).sum() + 0.3 * sum((edge**2).sum() for edge in edges)
            objective = objective + F.cross_entropy(inside, y)
            objective = objective + settings.lambda_in * (recognised * m.mean((1, 2, 3))).mean()
            objective = objective + settings.lambda_tv * rough / len(y)
        adam.zero_grad()
        objective.backward()
        torch.nn.utils.clip_grad_norm_(mapping, 10.0)

        # Gradient of L(m, f) for the classifier (eq. 8), before the mapping moves.
        if name != "F":
            sgd.zero_grad()
            if settings.classifier_update == "joint" or drawn is None:
                losses = [F.cross_entropy(f(kind.detach())[0], y) for kind in kinds]
                if settings.classifier_update == "joint":
                    losses = [loss / (len(kinds) + 1) for loss in losses]
                    losses.append(F.cross_entropy(logits, y) / (len(kinds) + 1))
                sum(losses).backward()
                sgd.step()
        adam.step()
    return events


CASES = [
    (strategy, score, shared, update, objective)
    for strategy in ("F", "L", "FL", "L1", "L2")
    for score in ("entropy", "classification")
    for shared in (True, False)
    for update in ("joint", "alternating")
    for objective in ("masked_out", "masked_in_out")
]


@pytest.mark.parametrize(("strategy", "score", "shared", "update", "objective"), CASES)
def test_five_steps_agree_with_algorithm_1(
    strategy: str, score: Any, shared: bool, update: Any, objective: Any
) -> None:
    settings = config(
        strategy=strategy,
        score=score,
        shared_encoder=shared,
        classifier_update=update,
        objective=objective,
        lambda_in=0.7,
        lambda_tv=0.02,
        seed=4,
    )
    data = batches(5)
    model, literal = tiny_model(shared), tiny_model(shared)
    start = copy.deepcopy(model.state_dict())
    run(Engine(model, settings, classes=CLASSES, device=CPU), data)
    events = transcription(literal, settings, data)

    assert events["confused"] > 0
    assert events["right"] > 0
    assert (events["recognised"] > 0) == (objective == "masked_in_out")
    assert (events["history"] > 0) == (strategy not in ("F", "L"))
    assert (events["overwritten"] > 0) == (strategy in ("L1", "L2"))
    expected = literal.state_dict()
    worst = max(float((t - expected[n]).abs().max()) for n, t in model.state_dict().items())
    moved = max(float((start[n] - expected[n]).abs().max()) for n in start)
    assert moved > 1e-2
    assert worst < 1e-10  # measured 2e-14; the requirement is 1e-6


def test_a_fixed_classifier_stays_bit_by_bit_and_gets_no_gradient() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.classifier.state_dict())
    decoder = copy.deepcopy(model.decoder.state_dict())
    run(Engine(model, config(strategy="F"), classes=CLASSES, device=CPU), batches(4))
    assert all(torch.equal(before[n], t) for n, t in model.classifier.state_dict().items())
    assert all(p.grad is None for p in model.classifier.parameters())
    assert any(not torch.equal(decoder[n], t) for n, t in model.decoder.state_dict().items())


def test_the_mask_objective_never_reaches_the_classifier() -> None:
    """With a classifier rate of 0 and no weight decay, only running statistics may move."""
    model = tiny_model()
    before = copy.deepcopy(dict(model.classifier.named_parameters()))
    settings = config(strategy="L1", classifier_lr=0.0, weight_decay=0.0)
    run(Engine(model, settings, classes=CLASSES, device=CPU), batches(4))
    assert all(torch.equal(before[n], p) for n, p in model.classifier.named_parameters())


@pytest.mark.parametrize("strategy", ["L", "L1"])
def test_running_statistics_can_stay_those_of_clean_images(strategy: str) -> None:
    """With a classifier rate of 0 they are what clean images alone leave."""
    fields = {"strategy": strategy, "classifier_lr": 0.0, "weight_decay": 0.0}
    plain, data = tiny_model(), batches(4)
    for images, _ in data:
        plain.classifier(images)
    for masked, same in ((False, True), (True, False)):
        model = tiny_model()
        settings = config(masked_statistics=masked, **fields)
        run(Engine(model, settings, classes=CLASSES, device=CPU), data)
        for index in ("first", "second"):
            found, expected = (m.classifier.backbone[index][1] for m in (model, plain))
            assert torch.allclose(found.running_mean, expected.running_mean) == same
            assert torch.allclose(found.running_var, expected.running_var) == same
            assert found.momentum == expected.momentum


def test_pretraining_is_plain_sgd_with_the_documented_schedule() -> None:
    settings = config(pretrain_lr=0.2, pretrain_weight_decay=0.01)
    data = batches(6)
    model, plain = tiny_model(), tiny_model()
    decoder = copy.deepcopy(model.decoder.state_dict())
    engine = Engine(model, settings, classes=CLASSES, device=CPU)
    sgd = torch.optim.SGD(plain.classifier.parameters(), lr=0.0, momentum=0.9, weight_decay=0.01)
    for index, (images, labels) in enumerate(data):
        engine.step(images, labels, index, len(data), 0)
        sgd.param_groups[0]["lr"] = 0.2 * pretrain_schedule(index, len(data))
        sgd.zero_grad()
        F.cross_entropy(plain.classifier(images)[0], labels).backward()
        sgd.step()
    for name, tensor in plain.classifier.state_dict().items():
        torch.testing.assert_close(model.classifier.state_dict()[name], tensor)
    assert all(torch.equal(decoder[n], t) for n, t in model.decoder.state_dict().items())


def test_pretrain_schedule_rises_then_falls_to_zero() -> None:
    factors = [pretrain_schedule(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert pretrain_schedule(0, 1) == 1.0


def test_rates_fall_every_schedule_epochs() -> None:
    settings = config(strategy="L", schedule_epochs=2, schedule_factor=0.5)
    engine = Engine(tiny_model(), settings, classes=CLASSES, device=CPU)
    engine.begin("casm")
    images, labels = batches(1)[0]
    rates = []
    for epoch in range(5):
        engine.step(images, labels, epoch, 5, epoch)
        rates.append(
            tuple(descent.rate for descent in (engine.classifier_descent, engine.decoder_descent))
        )
    factors = (1.0, 1.0, 0.5, 0.5, 0.25)
    assert rates == [pytest.approx((0.1 * factor, 0.01 * factor)) for factor in factors]


@pytest.mark.parametrize("infill", ["mean", "colour", "blur", "noise"])
def test_infill_replaces_the_salient_part_alone(infill: Any) -> None:
    settings = config(infill=infill, infill_colour=(1.0, 0.0, 0.25), infill_sigma=2.0)
    engine = Engine(tiny_model(), settings, classes=CLASSES, device=CPU)
    images = torch.rand(2, 3, 16, 16)
    saliency = torch.zeros(2, 1, 8, 8)
    saliency[:, :, :, 4:] = 1.0
    masked = engine.passes.masked_out(images, saliency)
    assert torch.equal(masked[..., :8], images[..., :8])
    removed = masked[..., 8:]
    assert not torch.equal(removed, images[..., 8:])
    if infill == "mean":
        assert not removed.any()
    elif infill == "colour":
        expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.25 - 0.406) / 0.225]
        assert torch.allclose(removed[0, :, 3, 3], torch.tensor(expected))
        assert torch.equal(removed[..., 0, 0], removed[..., 5, 5])
    elif infill == "noise":
        assert 0.6 < float(removed.std()) < 1.4
    else:
        assert float(removed.std()) < 0.5 * float(images.std())


def test_statistics_are_means_over_the_images() -> None:
    model, settings = tiny_model(), config(strategy="F")
    engine = Engine(model, settings, classes=CLASSES, device=CPU)
    data = batches(2)
    data[1] = (data[1][0][:2], data[1][1][:2])  # a smaller batch weighs less
    model.eval()
    rows = []
    engine.begin("casm")
    for index, (images, labels) in enumerate(data):
        twin = copy.deepcopy(model)
        logits, taps = twin.classifier(images)
        m = twin.decoder([tap.detach() for tap in taps])
        out = twin.classifier(images * (1 - F.interpolate(m, (8, 8))))[0]
        clean, masked = (F.cross_entropy(z, labels, reduction="none") for z in (logits, out))
        hits = [(z.argmax(1) == labels).double() for z in (logits, out)]
        entropy = torch.distributions.Categorical(logits=out).entropy()
        rows.append(torch.stack([(clean + masked) / 2, entropy, m.mean((1, 2, 3)), *hits]))
        engine.step(images, labels, index, 2, 0)
    means = torch.cat(rows, 1).mean(1).tolist()
    names = ("loss", "entropy", "mean_saliency", "accuracy", "masked_accuracy")
    assert engine.statistics() == pytest.approx(dict(zip(names, means, strict=True)), rel=1e-5)
    assert engine.statistics() == dict.fromkeys(names, 0.0)  # nothing since


def test_a_loss_that_is_no_number_is_named_with_its_step() -> None:
    engine = Engine(tiny_model(), config(strategy="L"), classes=CLASSES, device=CPU)
    engine.begin("casm")
    data = batches(4)
    data[2][0][0, 0, 0, 0] = float("nan")
    for index, (images, labels) in enumerate(data):
        engine.step(images, labels, index, 4, 0)
    with pytest.raises(
        FloatingPointError,
        match=r"^the loss is not a finite number from step 2 of the casm phase on: try a lower "
        r"classifier_lr or decoder_lr; the state saved last is from before that step$",
    ):
        engine.statistics()


def test_auto_lambda_answers_every_step() -> None:
    engine = Engine(tiny_model(), config(strategy="L", lambda_r="auto"), classes=3, device=CPU)
    engine.begin("casm")
    start = float(engine.lambda_r)
    engine.step(*batches(1)[0], 0, 1, 0)
    means = engine.statistics()
    gain = (PROPORTIONAL + INTEGRAL) * math.log(3)
    assert means["lambda_r"] - start == pytest.approx(gain * (means["mean_saliency"] - 0.5))


@pytest.mark.parametrize(
    "fields", [{}, {"amp": "fp16"}, {"accumulate": 3, "classifier_update": "alternating"}]
)
def test_state_continues_bit_by_bit(fields: dict[str, Any]) -> None:
    settings = config(strategy="L2", **fields)
    data = float_batches(6)
    whole, first, second = (
        Engine(tiny_model().float(), settings, classes=CLASSES, device=CPU) for _ in range(3)
    )
    for engine in (whole, first):
        engine.begin("casm")
        if engine.decoder_descent.scale is not None:
            engine.decoder_descent.scale.scale.fill_(2.0**126)  # steps are left out
    for index in range(6):
        whole.step(*data[index], index, 6, 0)
    for index in range(3):
        first.step(*data[index], index, 6, 0)
    second.restore(copy.deepcopy(first.state()), first.history.snapshots)
    for index in range(3, 6):
        second.step(*data[index], index, 6, 0)
    expected = whole.model.state_dict()
    assert all(torch.equal(expected[n], t) for n, t in second.model.state_dict().items())
    assert whole.statistics() == second.statistics()


@pytest.fixture
def host_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every place in the engine or objective that reads a tensor's value on the host."""
    places: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)

        def spy(self: Tensor, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            code = sys._getframe(1).f_code
            if code.co_filename.endswith(("engine.py", "passes.py", "descent.py", "objective.py")):
                places.append(f"{code.co_filename}:{code.co_name}")
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    return places


@pytest.mark.parametrize("strategy", ["F", "L", "FL", "L1"])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_steps_read_nothing_on_the_host(strategy: str, amp: Any, host_reads: list[str]) -> None:
    settings = config(strategy=strategy, amp=amp, accumulate=2)
    engine = Engine(tiny_model().float(), settings, classes=CLASSES, device=CPU)
    run(engine, [(images.float(), labels) for images, labels in batches(3)])
    assert host_reads == []
    engine.statistics()
    assert host_reads != []  # the spy works


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("strategy", ["F", "L", "FL", "L1"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"amp": "fp16", "accumulate": 2}, {"history_device": "host", "decoder_ema": 0.9}],
)
def test_steps_do_not_synchronise_the_gpu(strategy: str, fields: dict[str, Any]) -> None:
    settings = config(strategy=strategy, lambda_r="auto", **fields)
    engine = Engine(tiny_model().float(), settings, classes=3, device=torch.device("cuda"))
    data = [(x.cuda(), y.cuda()) for x, y in float_batches(3)]
    run(engine, data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index, (images, labels) in enumerate(data):
            engine.step(images, labels, 3 + index, 6, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fields", [{"amp": "bf16"}, {"amp": "fp16"}, {"channels_last": False}])
def test_other_precisions_and_layouts_train(fields: dict[str, Any]) -> None:
    model = tiny_model().float()
    engine = Engine(model, config(strategy="L1", **fields), classes=CLASSES, device=CPU)
    run(engine, [(images.float(), labels) for images, labels in batches(4)])
    assert 0 < engine.statistics()["mean_saliency"] < 1
    assert all(p.dtype == torch.float32 for p in model.parameters())


def without_batch_normalisation(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        else:
            without_batch_normalisation(child)


@pytest.mark.parametrize("strategy", ["F", "L", "L2"])
@pytest.mark.parametrize("update", ["joint", "alternating"])
@pytest.mark.parametrize("objective", ["masked_out", "masked_in_out"])
def test_micro_batches_add_up_to_the_batch(strategy: str, update: Any, objective: Any) -> None:
    """24 images in one, three and five parts (of five and four), without batch normalisation."""
    found = []
    for accumulate in (1, 3, 5):
        settings = config(
            strategy=strategy,
            classifier_update=update,
            objective=objective,
            accumulate=accumulate,
            lambda_r="auto",
        )
        model = tiny_model()
        without_batch_normalisation(model)
        engine = Engine(model, settings, classes=CLASSES, device=CPU)
        start = copy.deepcopy(model.state_dict())
        for index, (images, labels) in enumerate(batches(2)):
            engine.step(images, labels, index, 2, 0)
        run(engine, batches(5))
        assert max(float((start[n] - t).abs().max()) for n, t in model.state_dict().items()) > 1e-2
        found.append((model.state_dict(), engine.statistics()))
    (whole, means), *others = found
    for parts, part_means in others:
        worst = max(float((whole[n] - t).abs().max()) for n, t in parts.items())
        assert worst < 1e-7  # measured 5e-9: lambda_R answers a float32 mean; 1e-6 is required
        assert part_means == pytest.approx(means, rel=1e-5)


def float_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(images.float(), labels) for images, labels in batches(count)]


def test_float16_follows_float32() -> None:
    models = {}
    for amp in ("off", "fp16"):
        settings = config(strategy="L2", amp=amp, classifier_lr=0.01)
        models[amp] = tiny_model().float()
        engine = Engine(models[amp], settings, classes=CLASSES, device=CPU)
        run(engine, float_batches(4))
        means = engine.statistics()
        if amp == "fp16":
            scales = means["classifier_loss_scale"], means["mask_loss_scale"]
            assert scales == (65536.0, 65536.0)  # nothing overflowed
    start, expected = tiny_model().float().state_dict(), models["off"].state_dict()
    for name, tensor in models["fp16"].state_dict().items():
        if tensor.is_floating_point():
            moved = float((expected[name] - start[name]).norm())
            assert float((tensor - expected[name]).norm()) < 0.05 * moved + 1e-3


@pytest.mark.parametrize("strategy", ["L", "F"])
def test_an_overflow_leaves_the_step_out_and_the_run_going(strategy: str) -> None:
    engine = Engine(
        tiny_model().float(), config(strategy=strategy, amp="fp16"), classes=3, device=CPU
    )
    engine.begin("casm")
    for descent in (engine.classifier_descent, engine.decoder_descent):
        descent.scale.scale.fill_(2.0**127)
    weights = {n: p.clone() for n, p in engine.model.named_parameters()}
    data = float_batches(8)
    engine.step(*data[0], 0, 8, 0)
    engine.check_finite()
    assert all(torch.equal(weights[n], p) for n, p in engine.model.named_parameters())
    assert float(engine.decoder_descent.scale.scale) == 2.0**126
    engine.decoder_descent.scale.scale.fill_(2.0**10)
    engine.step(*data[1], 1, 8, 0)
    engine.check_finite()
    moved = [n for n, p in engine.model.named_parameters() if not torch.equal(weights[n], p)]
    assert moved
    assert all(name.startswith("decoder.") for name in moved)  # the classifier's scale is too large


def test_gradients_that_are_never_finite_stop_the_run() -> None:
    engine = Engine(tiny_model().float(), config(strategy="L", amp="fp16"), classes=3, device=CPU)
    engine.begin("casm")
    engine.decoder_descent.scale.scale.fill_(float("inf"))  # no halving helps
    data = float_batches(1)[0]
    for index in range(31):
        engine.step(*data, index, 40, 0)
    engine.check_finite()
    engine.step(*data, 31, 40, 0)
    with pytest.raises(
        FloatingPointError,
        match=r"^the loss or its gradient is not a finite number from step 31 of the casm phase "
        r"on: try a lower classifier_lr or decoder_lr, or amp='off'; the state saved last is from",
    ):
        engine.check_finite()


def test_a_loss_that_is_no_number_stops_a_run_in_float16_at_once() -> None:
    engine = Engine(tiny_model().float(), config(strategy="L", amp="fp16"), classes=3, device=CPU)
    engine.begin("casm")
    images, labels = float_batches(1)[0]
    images[0, 0, 0, 0] = float("nan")
    engine.step(images, labels, 0, 1, 0)
    with pytest.raises(FloatingPointError, match="from step 0 of the casm phase"):
        engine.check_finite()
