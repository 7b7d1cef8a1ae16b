"""The proxy of torchvision's families: that it shares, computes and costs what it should; and what is documented."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer

from dynams_stream.checkpoint import load_weights
from dynams_stream.errors import UnsupportedLayerError
from dynams_stream.proxy import ParameterSharingProxy, joint_loss, slim_architecture

Factory = Callable[[], nn.Module]

CONVOLUTIONAL: dict[str, Factory] = {
    "resnet18": models.resnet18,
    "resnet50": models.resnet50,
    "wide_resnet50_2": models.wide_resnet50_2,
    "resnext50_32x4d": models.resnext50_32x4d,
    "regnet_y_400mf": models.regnet_y_400mf,
    "vgg11_bn": models.vgg11_bn,
    "alexnet": models.alexnet,
    "mobilenet_v2": models.mobilenet_v2,
    "mobilenet_v3_small": models.mobilenet_v3_small,
    "mobilenet_v3_large": models.mobilenet_v3_large,
    "mnasnet0_5": models.mnasnet0_5,
    "efficientnet_b0": models.efficientnet_b0,
    "efficientnet_v2_s": models.efficientnet_v2_s,
    "densenet121": models.densenet121,
    "googlenet": partial(models.googlenet, aux_logits=False, init_weights=False),
}
NORMALISED_OVER_CHANNELS: dict[str, Factory] = {
    "convnext_tiny": models.convnext_tiny,
    "vit_b_16": partial(models.vit_b_16, image_size=32),
    "swin_t": models.swin_t,
    "swin_v2_t": models.swin_v2_t,
}
FAMILIES = {**CONVOLUTIONAL, **NORMALISED_OVER_CHANNELS}
LARGE = {"vgg11_bn", "alexnet", "wide_resnet50_2", "resnet50", "mobilenet_v3_large", "efficientnet_v2_s", "swin_v2_t"}


def cases(names: Iterable[str]) -> list[Any]:
    """Names as test cases, the large networks among them marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in names]


every_family = pytest.mark.parametrize("name", cases(FAMILIES))
CLASSES = 5
SIZES = {"alexnet": 64, "vgg11_bn": 32}


@cache
def built(name: str) -> nn.Module:
    """A model whose every parameter and running statistic matters, and has values that occur once."""
    torch.manual_seed(0)
    model = FAMILIES[name](num_classes=CLASSES)  # type: ignore[call-arg]
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("running_var") or (tensor.dim() == 1 and key.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() == 1 and tensor.is_floating_point():
                tensor.normal_(std=0.1)
            elif key.endswith(("class_token", "pos_embedding", "layer_scale", "head.weight", "position_bias_table")):
                tensor.normal_()
    return model.eval()


def network_of(name: str, width: float = 0.5) -> ParameterSharingProxy:
    return ParameterSharingProxy(copy.deepcopy(built(name)), width).eval()


def images(name: str, batch: int = 2) -> Tensor:
    size = SIZES.get(name, 32)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7))


@cache
def kept_masks(name: str, width: float = 0.5) -> dict[str, Tensor]:
    """Which entries of each of the model's parameters the proxy has, by giving every entry a value of its own."""
    model = copy.deepcopy(built(name)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
    slim = ParameterSharingProxy(model, width).slim().state_dict()
    masks = {}
    for key, parameter in model.named_parameters():
        values = slim[key].flatten()
        masks[key] = torch.zeros(parameter.numel(), dtype=torch.bool)
        masks[key][values.long()] = True
        masks[key] = masks[key].reshape(parameter.shape)
        assert torch.equal(parameter[masks[key]], values), f"{key}: what stays keeps its order"
    return masks


@every_family
def test_all_but_normalisation_and_head_is_the_models(name: str) -> None:
    """No parameter of the proxy's own elsewhere, and what is shared follows the model's."""
    network = network_of(name)
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm)
    own = {key.rpartition(".")[0] for key, _ in network.proxy.named_parameters()}
    assert own == {network.head, *(key for key, layer in network.model.named_modules() if isinstance(layer, norms))}
    assert len(list(network.parameters())) == len({id(p) for p in network.parameters()})
    before = {key: tensor.clone() for key, tensor in network.slim().state_dict().items()}
    with torch.no_grad():
        for parameter in network.model.parameters():
            parameter.add_(1)
    parameters = dict(network.model.named_parameters())
    for key, tensor in network.slim().state_dict().items():
        moved = key in parameters and key.rpartition(".")[0] not in own
        assert torch.equal(tensor, before[key] + 1 if moved else before[key]), key


@every_family
def test_shared_weights_are_views_where_torch_allows(name: str) -> None:
    network = network_of(name)
    storages = {tensor.untyped_storage().data_ptr() for tensor in network.model.parameters()}
    copied = {
        key
        for key, layer in network.model.named_modules()
        for parameter, _ in layer.named_parameters(recurse=False)
        if getattr(network.proxy.get_submodule(key), parameter).untyped_storage().data_ptr() not in storages
        and parameter not in dict(network.proxy.get_submodule(key).named_parameters(recurse=False))
    }
    kinds = {type(network.model.get_submodule(key)).__name__ for key in copied}
    allowed = {"densenet121": {"Conv2d"}, "googlenet": {"Conv2d"}, "vit_b_16": {"MultiheadAttention"}}
    # side by side in memory lie neither the inputs of a layer behind a concatenation nor queries, keys and values
    assert kinds == allowed.get(name, {"Linear"} if name.startswith("swin") else set())
    if name.startswith("swin"):
        assert all(key.endswith("qkv") for key in copied if "reduction" not in key)


@every_family
def test_gradients_reach_what_is_kept_and_nothing_else(name: str) -> None:
    network = network_of(name)
    x, y = images(name), torch.tensor([1, 4])
    masks = kept_masks(name)
    F.cross_entropy(network.proxy_logits(x), y).backward()
    own = {key.rpartition(".")[0] for key, _ in network.proxy.named_parameters()}
    for key, parameter in network.model.named_parameters():
        if key.rpartition(".")[0] in own:
            assert parameter.grad is None, key
        else:
            assert parameter.grad is not None, key
            assert not parameter.grad[~masks[key]].any(), key
    assert all(parameter.grad is not None for parameter in network.proxy.parameters())
    joint_loss(F.cross_entropy, network(x), y).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@every_family
def test_the_proxy_costs_about_the_square_of_the_width(name: str) -> None:
    """p² between hidden layers; the first, the last and depthwise convolutions cost p of theirs."""
    network = network_of(name)

    def operations(module: nn.Module) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(images(name, 1))
        return int(counter.get_total_flops())

    share = operations(network.slim()) / operations(network.model)
    assert 0.25 <= share <= 0.31


@every_family
def test_the_slim_network_is_plain_and_computes_the_same(name: str, tmp_path: Path) -> None:
    network = network_of(name)
    x = images(name)
    logits, proxy_logits = network(x)
    assert logits.shape == proxy_logits.shape == (2, CLASSES)
    slim = network.slim()
    assert [type(layer) for layer in slim.modules()] == [type(layer) for layer in network.model.modules()]
    assert list(slim.state_dict()) == list(network.model.state_dict())
    network.save(tmp_path / "slim.safetensors")
    loaded = slim_architecture(FAMILIES[name](num_classes=CLASSES), 0.5).eval()  # type: ignore[call-arg]
    load_weights(loaded, str(tmp_path / "slim.safetensors"), width=0.5, head=None)
    with torch.inference_mode():
        assert torch.equal(loaded(x), network.proxy_logits(x))
    twin = pickle.loads(pickle.dumps(network))
    assert torch.equal(twin(x)[1], proxy_logits)
    assert len(list(twin.parameters())) == len(list(network.parameters()))


@pytest.mark.parametrize("name", cases(CONVOLUTIONAL))
@pytest.mark.parametrize("width", [0.5, 0.3])
def test_the_proxy_is_the_model_with_all_other_channels_cut(name: str, width: float) -> None:
    """The model whose other weights are zero computes what the proxy does: no channel is mistaken for another."""
    network = network_of(name, width)
    masks = kept_masks(name, width)
    cut = copy.deepcopy(network.model).double()
    with torch.no_grad():
        for key, parameter in cut.named_parameters():
            parameter.mul_(masks[key])
    x = images(name).double()
    torch.testing.assert_close(network.slim().double()(x), cut(x), rtol=1e-8, atol=1e-8)


def _swin_v2() -> nn.Module:
    model = SwinTransformer(
        [4, 4], 64, [2, 2, 6, 2], [2, 4, 8, 16], [8, 8], num_classes=CLASSES,
        block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    )  # fmt: skip
    for layer in model.modules():
        if hasattr(layer, "cpb_mlp"):  # 512 wide whatever the model's size
            hidden = round(512 * 2 / 3)
            layer.cpb_mlp[0] = nn.Linear(2, hidden)
            layer.cpb_mlp[2] = nn.Linear(hidden, layer.num_heads, bias=False)
    return model


AS_BUILT: dict[str, tuple[float, Factory]] = {
    "convnext_tiny": (
        0.5,
        lambda: ConvNeXt(
            [
                CNBlockConfig(48, 96, 3),
                CNBlockConfig(96, 192, 3),
                CNBlockConfig(192, 384, 9),
                CNBlockConfig(384, None, 3),
            ],
            num_classes=CLASSES,
        ),
    ),
    "vit_b_16": (0.5, lambda: VisionTransformer(32, 16, 12, 6, 384, 1536, num_classes=CLASSES)),
    "swin_t": (2 / 3, lambda: SwinTransformer([4, 4], 64, [2, 2, 6, 2], [2, 4, 8, 16], [7, 7], num_classes=CLASSES)),
    "swin_v2_t": (2 / 3, _swin_v2),
}


@pytest.mark.parametrize("name", cases(AS_BUILT))
def test_the_proxy_is_what_torchvision_builds_at_that_size(name: str) -> None:
    """Normalised over channels, the model with channels cut is another network; torchvision's own narrow one is not."""
    width, factory = AS_BUILT[name]
    network, reference = network_of(name, width), factory().eval()
    reference.load_state_dict(network.slim().state_dict(), strict=True)
    assert torch.equal(reference(images(name)), network.proxy_logits(images(name)))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (models.shufflenet_v2_x0_5, r"stage2\.0 \(InvertedResidual\): view\(\)"),
        (models.squeezenet1_1, r"not from an nn.Linear"),
        (models.maxvit_t, r"blocks\.0.* cannot be slimmed"),
    ],
)
def test_other_families_are_refused_by_name(factory: Factory, message: str) -> None:
    arguments = {"input_size": (224, 224)} if factory is models.maxvit_t else {}
    with pytest.raises(Exception, match=message) as caught:
        ParameterSharingProxy(factory(num_classes=CLASSES, **arguments))  # type: ignore[call-arg]
    assert isinstance(caught.value, UnsupportedLayerError) or "head=" in str(caught.value)


def test_the_page_lists_what_is_tested() -> None:
    page = (Path(__file__).parent.parent / "docs" / "method.md").read_text()
    table = page.split("### What can be slimmed")[1].split("###")[0]
    assert set(re.findall(r"`([a-z0-9_]+)`", table.split("Not supported")[0])) == set(FAMILIES)
