"""A head applied to cells: grids of tokens, layers in order, the first tensor of what a model returns."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pixelss.cam.reading import Branch, Plan, cells_of, first_tensor, grid_of, is_classifier, read_cells, run


@pytest.mark.parametrize(
    ("cells", "size", "stride", "grid"),
    [
        (24, (64, 96), 16, (4, 6)),
        (35, (65, 97), 16, (5, 7)),  # padded images
        (24, (65, 97), 16, (4, 6)),  # cut ones
        (25, (64, 96), 16, None),
    ],
)
def test_grids(cells, size, stride, grid):
    assert grid_of(cells, size, stride) == grid


def test_the_layouts_of_a_map_are_one():
    cells = torch.randn(2, 4, 6, 5)
    layouts = {"NCHW": cells.permute(0, 3, 1, 2), "NHWC": cells}
    layouts["NLC"] = torch.cat([torch.zeros(2, 3, 5), cells.flatten(1, 2)], 1)  # three class tokens
    for layout, found in layouts.items():
        plan = Plan(layout, 3 if layout == "NLC" else 0, 16, (), False, (64, 96))
        assert torch.equal(cells_of(found, plan, (64, 96)), cells)
    with pytest.raises(ValueError, match=r"27 tokens, 3 of them class tokens, are no map of stride 16 on \(64, 64\)"):
        cells_of(layouts["NLC"], plan, (64, 64))


def test_layers_in_order_and_the_mean_of_two_classifiers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3), nn.Conv2d(5, 3, 1, bias=False))
    nn.init.normal_(model[0].weight)
    cells = torch.randn(2, 4, 6, 5)
    scores = read_cells(model, (Branch((("0", "vector"),), "1"), Branch((), "2")), cells, bias=True)
    for i in range(4):
        for j in range(6):
            cell = cells[:, i, j]
            expected = (model[1](model[0](cell)) + model[2](cell[:, :, None, None]).flatten(1)) / 2
            torch.testing.assert_close(scores[:, i, j], expected)


def test_a_batch_norm_takes_its_stored_statistics_in_training():
    model = nn.ModuleList([nn.BatchNorm1d(5), nn.Linear(5, 3)])
    model[0].running_mean.uniform_()
    cells = torch.randn(2, 4, 6, 5)
    before = model[0].running_mean.clone()
    trained = read_cells(model.train(), (Branch((("0", "vector"),), "1"),), cells)
    assert torch.equal(trained, read_cells(model.eval(), (Branch((("0", "vector"),), "1"),), cells))
    assert torch.equal(model[0].running_mean, before)


def test_classifiers():
    assert is_classifier(nn.Linear(2, 2))
    assert is_classifier(nn.Conv2d(2, 2, 1))
    assert not is_classifier(nn.Conv2d(2, 2, (1, 3)))
    assert not is_classifier(nn.Conv2d(2, 2, 1, groups=2))
    assert not is_classifier(nn.ReLU())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: SimpleNamespace(logits=x), lambda x: OrderedDict(first=x)])
def test_the_tensor_of_an_output(wrap):
    x = torch.ones(2)
    assert first_tensor(wrap(x), "logits") is x
    assert first_tensor((x, None), "logits") is x
    with pytest.raises(ValueError, match="the model must give logits as a tensor, but gives a str"):
        first_tensor("x", "logits")


def test_the_output_of_a_part_is_met_and_no_hook_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(1, 3, 4, 4)
    found, logits = run(model, "0", x, {})
    assert torch.equal(found, model[0](x))
    assert torch.equal(logits, model(x))
    assert not model[0]._forward_hooks
