from __future__ import annotations

import pytest
import torch
from torch import nn

from pixelss import timm_backbone, vit_attention
from tests.lazily import Lazily
from tests.oracles import assert_refuses

timm = Lazily("timm")

SIGNATURES = {"vit_attention": "(model, *, blocks=None)"}

BLOCKS = {"vit_attention": "a context manager around a network of timm, tested here"}

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}

# name, settings, tokens
FAMILIES = {
    "vit_tiny_patch16_224": ({"img_size": 48}, 1 + 9),
    "deit_tiny_distilled_patch16_224": ({"img_size": 48}, 2 + 9),
    "deit3_small_patch16_224": ({"img_size": 48}, 1 + 9),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 42}, 5 + 9),
    "vit_relpos_small_patch16_224": ({"img_size": 48}, 9),
    "beit_base_patch16_224": ({"img_size": 48}, 1 + 9),
    "eva02_tiny_patch14_224": ({"img_size": 42}, 1 + 9),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    settings, _ = FAMILIES[name]
    model = timm.create_model(name, **TINY, **settings).eval()
    return model, torch.randn(2, 3, settings["img_size"], settings["img_size"])


def attentions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "attn_drop")]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_weights_are_recorded_and_the_output_is_the_same(name):
    model, images = make(name)
    for attention in attentions(model):
        attention.fused_attn = True
    expected = model(images)
    with vit_attention(model) as recorded:
        actual = model(images)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    weights = torch.stack(recorded)
    T = FAMILIES[name][1]
    assert weights.shape == (3, 2, 2, T, T)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 2, T))
    assert all(attention.fused_attn and not attention.attn_drop._forward_pre_hooks for attention in attentions(model))


@torch.no_grad()
def test_the_weights_are_those_of_queries_and_keys():
    model, images = make("vit_tiny_patch16_224")
    inputs = []
    handle = model.blocks[1].attn.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with vit_attention(model, blocks=(1,)) as recorded:
        model(images)
    handle.remove()
    q, k, _ = model.blocks[1].attn.qkv(inputs[0]).view(2, 10, 3, 2, 12).permute(2, 0, 3, 1, 4)
    expected = torch.stack(
        [torch.stack([(q[b, a] @ k[b, a].T / 12**0.5).softmax(-1) for a in range(2)]) for b in range(2)]
    )
    torch.testing.assert_close(recorded[0], expected)


@torch.no_grad()
def test_chosen_blocks_come_in_the_order_of_the_network():
    model, images = make("vit_tiny_patch16_224")
    with vit_attention(model) as every:
        model(images)
    for blocks, order in (((0,), [0]), ((-1, 0), [0, 2]), ((1, 2), [1, 2])):
        with vit_attention(model, blocks=blocks) as some:
            model(images)
        assert len(some) == len(order)
        for weights, i in zip(some, order, strict=True):
            torch.testing.assert_close(weights, every[i])


@torch.no_grad()
def test_every_forward_pass_fills_the_list_anew():
    model, images = make("vit_tiny_patch16_224")
    with vit_attention(model, blocks=(-2, -1)) as recorded:
        assert recorded == []
        model(images)
        first = list(recorded)
        model(images[:1])
        assert [len(weights) for weights in recorded] == [1, 1]
    model(images)
    assert [len(weights) for weights in recorded] == [1, 1]
    assert [len(weights) for weights in first] == [2, 2]


def test_the_model_is_as_it_was_after_an_error():
    model, _ = make("vit_tiny_patch16_224")
    before = [attention.fused_attn for attention in attentions(model)]
    with pytest.raises(ZeroDivisionError), vit_attention(model, blocks=(0, 1)):
        raise ZeroDivisionError
    assert [attention.fused_attn for attention in attentions(model)] == before
    assert not any(attention.attn_drop._forward_pre_hooks for attention in attentions(model))


def test_weights_carry_a_gradient_and_dropout_does_not_touch_them():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, attn_drop_rate=0.5, **TINY).train()
    with vit_attention(model, blocks=(-1,)) as recorded:
        model(torch.randn(2, 3, 48, 48))
    torch.testing.assert_close(recorded[0].sum(-1), torch.ones(2, 2, 10))
    recorded[0][..., 0].sum().backward()
    assert model.blocks[-1].attn.qkv.weight.grad.any()


@torch.no_grad()
def test_a_backbone_of_the_library_will_do():
    model = nn.Sequential(timm_backbone("vit_tiny_patch16_224", output_stride=16, embed_dim=24, depth=3, num_heads=2))
    with vit_attention(model.eval()) as recorded:
        model(torch.randn(1, 3, 48, 64))
    assert torch.stack(recorded).shape == (3, 1, 2, 13, 13)


SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
OTHERS = [
    ("swin_tiny_patch4_window7_224", SWIN, "WindowAttention"),
    ("cait_xxs24_224", {"img_size": 32, "depth": 1}, "TalkingHeadAttn"),
    ("resnet18", {}, "no attention of timm"),
    ("pvt_v2_b0", {}, "pvt_v2.Attention"),  # fewer keys than queries
]


@pytest.mark.parametrize(("name", "settings", "what"), OTHERS)
def test_other_networks_are_refused(name, settings, what):
    model = timm.create_model(name, **settings)
    with pytest.raises(ValueError, match=rf"model must attend .*{what}.*DINOv2"), vit_attention(model):
        pass


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("model", "vit", TypeError),
        ("blocks", (3,), ValueError),
        ("blocks", (-4,), ValueError),
        ("blocks", (0.5,), TypeError),
        ("blocks", 3, TypeError),
        ("blocks", (), ValueError),
        ("blocks", (1, 1), ValueError),
        ("blocks", (2, -1), ValueError),
    ],
)
def test_refuses(name, value, error):
    def enter(model, blocks):
        with vit_attention(model, blocks=blocks):
            pass

    assert_refuses(enter, {"model": make("vit_tiny_patch16_224")[0], "blocks": (0, -1)}, name, value, error)
