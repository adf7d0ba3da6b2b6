"""What lies in the tensors that are stepped, and when it is to be read anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from weyl_megatron.layouts.buffers import Buffer, Parameter, Shard
from weyl_megatron.layouts.plain import plain_buffer
from weyl_megatron.tensors import ParamGroups, SteppedTensors


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2, 3, 2, 2))


def stepped(*tensors: Tensor, are_parameters: bool = True) -> tuple[SteppedTensors, ParamGroups]:
    buffers = [plain_buffer(tensor, f"w{n}", {}) for n, tensor in enumerate(tensors)]
    groups = [{"params": [tensor]} for tensor in tensors]
    return SteppedTensors(buffers, are_parameters=are_parameters), groups


def test_nothing_has_changed_where_only_values_have() -> None:
    first, second = parameters()
    tensors, groups = stepped(first, second)
    first.data.mul_(2)
    second.grad = torch.ones_like(second)
    assert not tensors.have_changed(groups, share_a_budget=True)


@pytest.mark.parametrize("change", ["shape", "dtype", "memory order", "frozen", "came"])
def test_what_is_read_anew(change: str) -> None:
    first, second = parameters()
    tensors, groups = stepped(first, second)
    if change == "shape":
        first.data = torch.ones(5, 3)
    elif change == "dtype":
        first.data = torch.ones(4, 3, dtype=torch.float64)
    elif change == "memory order":
        second.data = second.data.contiguous(memory_format=torch.channels_last)
    elif change == "frozen":
        first.requires_grad_(False)
    else:
        other = nn.Parameter(torch.ones(2))
        other.grad = torch.ones(2)
        groups = [*groups, {"params": [other]}]
    assert tensors.have_changed(groups, share_a_budget=True)


def test_who_is_frozen_changes_nothing_where_nobody_shares_a_budget() -> None:
    first, second = parameters()
    tensors, groups = stepped(first, second)
    first.requires_grad_(False)
    assert not tensors.have_changed(groups, share_a_budget=False)


def test_an_engine_s_tensors_are_those_of_its_layout() -> None:
    first, second = parameters()
    second.grad = torch.ones_like(second)
    tensors, groups = stepped(first, are_parameters=False)
    assert not tensors.have_changed([*groups, {"params": [second]}], share_a_budget=True)
    with pytest.raises(ValueError, match="does not have, beside parameter 'w0'"):
        tensors.by_device([*groups, {"params": [second]}])


def test_buffers_are_stepped_in_the_layout_s_order_with_their_groups() -> None:
    first, second = parameters()
    tensors, groups = stepped(first, second)
    ((device, members),) = tensors.by_device(groups[::-1]).items()
    assert device.type == "cpu"
    assert [buffer.name for buffer in members.buffers] == ["w0", "w1"]
    assert all(a is b for a, b in zip(members.param_groups, groups, strict=True))
    assert [buffer.name for buffer in tensors.in_groups(groups[::-1])] == ["w1", "w0"]


def test_a_rank_without_a_piece_steps_with_the_others_group() -> None:
    """Of an empty tensor that no parameter group lists."""
    shard = Shard(Parameter("w", (4, 3)), 0, 0, 0)
    tensors = SteppedTensors([Buffer(torch.empty(0), (shard,), (), 1)], are_parameters=False)
    groups: ParamGroups = [{"params": [], "lr": 1.0}, {"params": [], "lr": 2.0}]
    (members,) = tensors.by_device(groups).values()
    assert [group["lr"] for group in members.param_groups] == [2.0]


def test_a_weight_with_gaps_is_stepped_as_a_copy_and_one_without_memory_not_at_all() -> None:
    gaps = torch.ones(4, 6)[:, ::2].requires_grad_()
    tensors, groups = stepped(gaps)
    (members,) = tensors.by_device(groups).values()
    (weight,) = tensors.weights(members)
    assert weight is not gaps and weight.is_contiguous() and members.forms[0].stride == (3, 1)
    gaps.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="got a storage of 0 bytes"):
        tensors.weights(members)


def test_what_is_stepped_is_listed_anew_only_where_the_parameter_groups_are_others() -> None:
    first, second = parameters()
    tensors, groups = stepped(first, second)
    members = tensors.by_device(groups)
    assert tensors.by_device(list(groups)) is members  # the same groups in another list


@pytest.mark.parametrize("change", ["order", "group", "gone", "moved", "replaced", "frozen"])
def test_a_change_of_the_parameter_groups_is_seen(change: str) -> None:
    """They are the user's, who may put anything into them between two steps."""
    first, second = parameters()
    tensors, groups = stepped(first, second)
    groups = list(groups)
    before = tensors.by_device(groups)
    expected = {"w0": groups[0], "w1": groups[1]}
    if change == "order":
        groups.reverse()
    elif change == "group":
        groups[1] = {**groups[1], "lr": 1.0}
        expected["w1"] = groups[1]
    elif change == "gone":
        del groups[1]["params"][0]
        del expected["w1"]
    elif change == "moved":  # the list of all tensors is the same
        groups[0]["params"].append(groups[1]["params"].pop())
        expected["w1"] = groups[0]
    elif change == "replaced":
        groups[1]["params"][0] = nn.Parameter(second.detach())
        del expected["w1"]
    else:
        second.requires_grad_(False)
        del expected["w1"]
    after = tensors.by_device(groups)
    assert after is not before
    (members,) = after.values()
    names = [buffer.name for buffer in members.buffers]
    assert names == list(expected)
    wanted = expected.values()
    assert all(a is b for a, b in zip(members.param_groups, wanted, strict=True))


@pytest.mark.parametrize("smaller", [0, 4, 44])
def test_a_weight_whose_storage_shrinks_between_two_steps_is_refused(smaller: int) -> None:
    first, second = parameters()
    tensors, groups = stepped(first, second)
    (members,) = tensors.by_device(groups).values()
    tensors.weights(members)
    first.untyped_storage().resize_(smaller)
    with pytest.raises(ValueError, match=f"got a storage of {smaller} bytes, it takes 48"):
        tensors.weights(members)


def swapped(*tensors: Tensor) -> tuple[SteppedTensors, ParamGroups]:
    """Tensors of 12 elements each, which an engine keeps elsewhere between steps."""
    buffers = [
        Buffer(tensor, (Shard(Parameter(f"w{n}", (4, 3)), 0, 12, 0),), swapped=12)
        for n, tensor in enumerate(tensors)
    ]
    return SteppedTensors(buffers, are_parameters=False), [{"params": list(tensors)}]


def test_elements_that_come_and_go_change_nothing() -> None:
    first, second = (nn.Parameter(torch.empty(0)) for _ in range(2))
    tensors, groups = swapped(first, second)
    for here, away in ((first, second), (second, first)):
        here.data, away.data = torch.ones(12), torch.empty(0)
        assert not tensors.have_changed(groups, share_a_budget=True)
        groups = [{"params": [here]}]
        (members,) = tensors.by_device(groups).values()
        assert members.held()[0] is here and tensors.weights(members)[0] is here
    second.data = torch.empty(0)
    with pytest.raises(ValueError, match="from parameter 'w1' on got 0 elements in a step, it ta"):
        tensors.by_device(groups)


def test_elements_that_come_in_another_dtype_are_read_anew() -> None:
    first = nn.Parameter(torch.empty(0))
    tensors, groups = swapped(first)
    first.data = torch.ones(12, dtype=torch.float64)
    assert tensors.have_changed(groups, share_a_budget=True)
