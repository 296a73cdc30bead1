"""The averaged mapping against its formula, and where it is used."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_training_engine import CLASSES, CPU, batches, config, tiny_model

from casm_fast.data.synthetic import generate
from casm_fast.models.checkpoint import load
from casm_fast.training import TrainConfig, train
from casm_fast.training.engine import Engine


@pytest.mark.parametrize("shared", [True, False])
def test_the_average_is_the_exponential_mean_of_the_mapping(shared: bool) -> None:
    settings = config(strategy="L", decoder_ema=0.2, shared_encoder=shared)
    model = tiny_model(shared)
    engine = Engine(model, settings, classes=CLASSES, device=CPU)
    engine.begin("casm")
    names = [name for name in model.state_dict() if not name.startswith("classifier.")]
    expected = {name: model.state_dict()[name].clone() for name in names}
    for index, (images, labels) in enumerate(batches(4)):
        engine.step(images, labels, index, 4, 0)
        decay = (0.1, 2 / 11, 0.2, 0.2)[index]
        for name in names:
            live = model.state_dict()[name]
            if live.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * live
            else:
                expected[name] = live.clone()
    found = engine.outcome.state_dict()
    assert any("separate_encoder" in name for name in names) == (not shared)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
        if name.endswith("weight") and "head" not in name:
            assert not torch.equal(found[name], model.state_dict()[name])
    assert engine.outcome.classifier is model.classifier
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


def test_training_does_not_notice_the_average() -> None:
    states = []
    for decay in (0.0, 0.9):
        engine = Engine(
            tiny_model(), config(strategy="L2", decoder_ema=decay), classes=3, device=CPU
        )
        engine.begin("casm")
        for index, (images, labels) in enumerate(batches(3)):
            engine.step(images, labels, index, 3, 0)
        states.append(copy.deepcopy(engine.model.state_dict()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_validates_and_writes_the_average(tmp_path: Path) -> None:
    settings = TrainConfig(
        data="synthetic:images=64,size=32,classes=4",
        input_size=32,
        batch_size=16,
        pretrain_epochs=0,
        epochs=1,
        strategy="L",
        decoder_ema=0.9,
        output=tmp_path / "run",
        device="cpu",
        progress=False,
        tensorboard=False,
    )
    sources = [
        generate(64, size=32, classes=4, split=split, workers=1) for split in ("train", "val")
    ]
    run = train(settings, sources=(sources[0], sources[1]))
    state = torch.load(run.folder / "state" / "state.pt", weights_only=True)["engine"]
    model = load(run.folder)
    written = model.state_dict()
    assert torch.equal(
        written["classifier.backbone.conv1.weight"],
        state["model"]["classifier.backbone.conv1.weight"],
    )
    assert not torch.equal(written["decoder.final.weight"], state["model"]["decoder.final.weight"])
    images = torch.stack([torch.from_numpy(sources[1].image(i).copy()) for i in range(64)])
    from casm_fast.data.transforms import normalize

    with torch.no_grad():
        saliency, _ = model(normalize(images))
    assert run.scores["mean_saliency"] == pytest.approx(float(saliency.mean()), abs=1e-5)
