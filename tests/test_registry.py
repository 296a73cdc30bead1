"""The light call: the registered op and its gradients, without what autograd costs on the way."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from casm_fast.ops import blend, jitter_mask, registry, tv_norm, upsample_mask

OPS = torch.ops.casm_fast
SIGMA = 0.6


def inputs():
    generator = torch.Generator().manual_seed(0)
    image, reference = (torch.rand(2, 3, 9, 8, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, 3, 4, generator=generator)
    return image, reference, mask, torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)


# Each as its door calls it, and as the dispatcher has it with the registered gradient.
PAIRS = {
    "tv_norm": (
        lambda image, reference, mask, offset: tv_norm(mask, 2.0),
        lambda image, reference, mask, offset: OPS.tv_norm(mask, 2.0, True),
    ),
    "blend": (
        lambda image, reference, mask, offset: blend(image, reference, mask),
        lambda image, reference, mask, offset: OPS.blend(image, reference, mask),
    ),
    "upsample_mask": (
        lambda image, reference, mask, offset: upsample_mask(mask, (7, 9), SIGMA),
        lambda image, reference, mask, offset: OPS.upsample_mask(mask, 7, 9, SIGMA),
    ),
    "jitter_mask": (
        lambda *inputs: jitter_mask(*inputs, (6, 5), SIGMA),
        lambda *inputs: OPS.jitter_mask(*inputs, 6, 5, SIGMA),
    ),
}


@pytest.mark.parametrize("wanted", [(0,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_the_registered_ones(name, wanted):
    results = []
    for function in PAIRS[name]:
        arguments = inputs()
        for index in wanted:
            arguments[index].requires_grad_()
        out = function(*arguments)
        if out.requires_grad:
            (out**2).sum().backward()
        results.append((out.detach(), *(tensor.grad for tensor in arguments[:3])))
        assert out.requires_grad == any(grad is not None for grad in results[-1][1:])
    for light, registered in zip(*results, strict=True):
        assert (light is None) == (registered is None)
        assert light is None or torch.equal(light, registered)


@pytest.mark.parametrize("name", PAIRS)
def test_no_gradient_where_none_is_wanted(name):
    arguments = inputs()
    arguments[2].requires_grad_()
    with torch.no_grad():
        assert not PAIRS[name][0](*arguments).requires_grad
    with torch.inference_mode():
        assert PAIRS[name][0](*arguments).is_inference()


def test_a_mask_changed_before_the_backward_pass_is_an_error():
    mask = inputs()[2].requires_grad_()
    value = tv_norm(mask).sum()
    with torch.no_grad():
        mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_fakes_ask_what_the_kernels_would_refuse():
    with FakeTensorMode():
        with pytest.raises(ValueError, match=r"^tv_norm: expected `mask` of shape"):
            tv_norm(torch.rand(3, 4))
        with pytest.raises(ValueError, match=r"^blend: expected `mask` no larger than `image`"):
            blend(torch.rand(1, 3, 4, 4), None, torch.rand(1, 1, 5, 5))


def test_other_errors_of_an_op_stay_as_they_are():
    """Arguments that pass every check of the door, and yet no kernel takes them."""
    with pytest.raises(NotImplementedError, match="tv_norm"):
        tv_norm(torch.rand(1, 1, 4, 4).to_sparse())


def test_an_op_is_looked_up_at_every_call(monkeypatch):
    calls = []

    class Others:
        def blend(self, *arguments):
            calls.append(arguments)

    light = registry.light("blend")
    monkeypatch.setattr(torch.ops, "casm_fast", Others())
    light(1, 2, 3)
    assert calls == [(1, 2, 3)]


def test_doors_compile_to_one_graph_for_any_size():
    """dynamic=True makes sizes and even default numbers symbolic."""

    def step(image, reference, mask, offset):
        size = (image.shape[2] - 2, image.shape[3] - 2)
        seen = jitter_mask(image, reference, mask, offset, size, SIGMA)
        return seen.sum() + blend(image, reference, mask).sum() + tv_norm(mask).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 1):
        arguments = [tensor[:batch] for tensor in inputs()]
        arguments[0] = torch.nn.functional.pad(arguments[0], (0, batch))
        arguments[1] = torch.nn.functional.pad(arguments[1], (0, batch))
        mask = arguments[2].requires_grad_()
        (grad,) = torch.autograd.grad(compiled(*arguments), mask)
        (expected,) = torch.autograd.grad(step(*arguments), mask)
        torch.testing.assert_close(grad, expected)
