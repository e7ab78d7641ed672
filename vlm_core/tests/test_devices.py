"""Trap 9: under ``device_map="auto"`` layers lie on several devices, and so must everything that is done in them.

A machine with one device cannot have that, so devices are pretended: every tensor carries the name of one, ``device`` and ``to`` answer
accordingly, and an operation on tensors of two devices fails as it would between two graphics cards.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from vlm_core import AttentionMass, DropTokens, HiddenStates, KnockOut, MergeTokens, Steer, ZeroHeads
from vlm_core.items import item_number
from vlm_core.seam.plan import Program
from vlm_core.subjects.embed import encode_items
from vlm_core.subjects.rows import forward_rows
from vlm_core.tests.test_interventions import every_kind, normal
from vlm_core.tests.tiny import make_items, tiny_subject

HOME = torch.device("cpu")


def place(tensor):
    """The pretended device of a tensor."""
    return getattr(tensor, "_pretended", HOME)


def put(tensor, device):
    """The same numbers on another pretended device."""
    if place(tensor) == device:
        return tensor
    copy = tensor.detach().clone()
    copy._pretended = device
    return copy


class PretendedDevices(TorchFunctionMode):
    """Tensors of two pretended devices cannot be mixed (numbers without dimensions from home excepted, as in PyTorch)."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__" and func == torch.Tensor.device.__get__:
            return place(args[0])
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
        places = {place(one) for one in tensors if one.ndim or place(one) != HOME}
        if name == "to":
            wanted = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, torch.device | str)]
            target = torch.device(wanted[0]) if wanted else place(tensors[1]) if len(tensors) > 1 else place(tensors[0])
            dtypes = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, torch.dtype)]
            moved = put(args[0], target)
            return _labelled(moved.to(dtypes[0]), target) if dtypes and dtypes[0] != moved.dtype else moved
        if len(places) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {sorted(map(str, places))}")
        target = places.pop() if places else HOME
        if not tensors and kwargs.get("device") is not None:
            target = torch.device(kwargs.pop("device"))
        elif "device" in kwargs and kwargs["device"] is not None:
            target = torch.device(kwargs.pop("device"))
        self.seen.add(target)
        result = func(*args, **kwargs)
        return tree_map(lambda one: _labelled(one, target) if isinstance(one, torch.Tensor) else one, result)


def _labelled(tensor, device):
    if place(tensor) != device:
        tensor._pretended = device
    return tensor


@pytest.fixture(params=["sdpa", "eager"])
def spread(request):
    """A subject whose three layers lie on three devices, its head on the last; inputs are moved as accelerate does, after the hooks."""
    subject = tiny_subject(attention=request.param, kv_heads=2)
    anatomy = subject.anatomy
    homes = [(layer, torch.device(f"cpu:{number + 1}")) for number, layer in enumerate(anatomy.layers)]
    for module, device in (*homes, (anatomy.norm, homes[-1][1]), (anatomy.head, homes[-1][1])):
        for parameter in module.parameters():
            parameter._pretended = device

        def forward(*args, _forward, _device, **kwargs):
            args, kwargs = tree_map(lambda one: put(one, _device) if isinstance(one, torch.Tensor) else one, (args, kwargs))
            return _forward(*args, **kwargs)

        module.forward = partial(forward, _forward=module.forward, _device=device)
    return subject


def test_the_pretence_notices_a_tensor_left_at_home(spread):
    """The test's own test: a plain forward passes, and what stays on one device fails on the next."""
    batch = spread.encode_items(make_items(2))
    with PretendedDevices() as devices, torch.inference_mode():
        seen = spread.model(**batch.inputs).logits
    assert {str(device) for device in devices.seen} >= {"cpu", "cpu:1", "cpu:2", "cpu:3"}
    assert place(seen) == torch.device("cpu:3")
    one = put(torch.ones(2), torch.device("cpu:1"))
    with PretendedDevices(), pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        one + torch.ones(2)


def test_every_intervention_stays_on_its_layers_device(spread):
    items = [make_items(6)[number] for number in (1, 2, 4)]
    plans = every_kind(spread, items)
    batch = spread.encode_items(items)
    watching = [AttentionMass(), HiddenStates()]
    for plan in plans:
        with spread.intervene(plan, batch, items=range(3)), torch.inference_mode():
            expected = spread.model(**batch.inputs).logits
        with PretendedDevices(), spread.intervene(plan, batch, items=range(3), observers=watching), torch.inference_mode():
            seen = spread.model(**batch.inputs).logits
        assert place(seen) == torch.device("cpu:3")
        assert torch.equal(seen.as_subclass(torch.Tensor), expected), plan


def test_rows_that_branch_stay_on_their_layers_device(spread):
    items = [make_items(6)[number] for number in (1, 2, 4)]
    plans = every_kind(spread, items)
    encoded = encode_items(spread, items)
    trunk = np.arange(3 * len(plans)) % 3
    rows = [plans[row // 3] for row in range(len(trunk))]
    wanted = (np.arange(len(rows)), np.array([len(encoded[index]) - 1 for index in trunk]))
    numbers = [item_number(item) for item in items]
    expected, _ = forward_rows(spread, encoded, trunk, rows, numbers, wanted)
    with PretendedDevices():
        seen, _ = forward_rows(spread, encoded, trunk, rows, numbers, wanted)
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(
    "plan",
    [
        None,
        (DropTokens(1, 0.5), ZeroHeads([(2, 1)], "question")),
        (MergeTokens(0, 0.5), Steer(2, normal(32))),
        KnockOut("last", "image", (1,)),
    ],
)
def test_generating_stays_on_each_layers_device(spread, plan):
    batch = spread.encode_items(make_items(3))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode():
        with spread.intervene(plan, batch):
            expected = spread.model.generate(**batch.inputs, **options)
        with PretendedDevices(), spread.intervene(plan, batch):
            seen = spread.model.generate(**batch.inputs, **options)
    assert torch.equal(seen, expected)


def test_programs_are_compiled_for_the_first_layers_device():
    with PretendedDevices():
        program = Program.compile([ZeroHeads([(0, 1)])], 3, 4, torch.device("cpu:1"))
        assert place(program.zero[0]) == torch.device("cpu:1")
