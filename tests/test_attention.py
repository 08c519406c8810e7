"""Attention of several layers joined: what `attention_affinity` and `class_token_cam` share; their tests have loops."""

from __future__ import annotations

import pytest
import torch

from pixelss import attention_affinity, class_token_cam

LAYERS = [torch.rand(2, 3, 11, 11) for _ in range(2)]
CAM = torch.rand(2, 5, 2, 3)
TAKE = {
    "attention_affinity": lambda attention: attention_affinity(attention),
    "class_token_cam": lambda attention: class_token_cam(attention, CAM, layers=2),
}


@pytest.mark.parametrize("take", TAKE.values(), ids=TAKE)
def test_a_list_of_layers_is_their_stack(take):
    assert torch.equal(take(LAYERS), take(torch.stack(LAYERS)))
    mixed = [LAYERS[0].half(), LAYERS[1]]
    assert torch.equal(take(mixed), take(torch.stack([layer.float() for layer in mixed])))


@pytest.mark.parametrize(
    ("attention", "error", "message"),
    [
        (3, TypeError, "attention must be a sequence of tensors, one a layer, but is of type int"),
        ([], ValueError, "attention must be a sequence .* is empty"),
        ([LAYERS[0], None], TypeError, r"attention\[1\] must be a torch.Tensor"),
        ([LAYERS[0], LAYERS[1].numpy()], TypeError, r"attention\[1\] must be .* Pass torch.from_numpy"),
        ([LAYERS[0], LAYERS[1][:1]], ValueError, r"attention\[1\] must have shape \(B=2"),
        ([LAYERS[0][0]] * 2, ValueError, r"attention\[0\] must have shape"),
        ([LAYERS[0], LAYERS[1].to("meta")], ValueError, r"attention\[1\] must lie on cpu"),
        (torch.rand(0, 2, 3, 11, 11), ValueError, "attention must have shape .*: L is 0"),
        (torch.rand(2, 2, 3, 11, 10), ValueError, "attention must have shape .*S=11"),
    ],
)
@pytest.mark.parametrize("take", TAKE.values(), ids=TAKE)
def test_every_layer_is_checked_before_they_are_stacked(take, attention, error, message):
    with pytest.raises(error, match=message):
        take(attention)
