"""The parameter sharing proxy: sharing, independence of what is its own, slimming, and what it refuses."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynams_stream.errors import HeadError, ShardedModelError, UnsupportedLayerError, UsageError
from dynams_stream.proxy import ParameterSharingProxy, find_head, joint_loss, slim_architecture


def flatten_head_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.PReLU(12), nn.Dropout(0.1), nn.Flatten()),
        *(nn.Linear(12 * 9, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 5)),
    )


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 16 * 16, 20), nn.GELU(), nn.Linear(20, 7), nn.ELU(), nn.Linear(7, 5)
    )


def depthwise_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=8), nn.SyncBatchNorm(16), nn.ReLU6()),
        *(
            nn.Conv2d(16, 6, 1),
            nn.InstanceNorm2d(6, affine=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        ),
    )


class WiderConv(nn.Conv2d):
    """A subclass that computes as its base."""


class Functional(nn.Module):
    """Everything that is written in forward: relu, pools, residual addition, mean, view, a buffer, options, dropout."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = WiderConv(3, 10, 3, padding=1)
        self.second = nn.Conv2d(10, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.gate = nn.Conv2d(10, 10, 1)
        self.hidden = nn.Linear(10 * 4, 9)
        self.head = nn.Linear(9, 5)
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if mask is not None:
            x = x * mask
        x = (x - self.mean) / 0.25 * scale
        x = F.relu(self.first(x))
        y = F.relu(self.norm(self.second(x)), inplace=True)
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y += x
        x = F.max_pool2d(F.pad(y, (1, 1, 1, 1)), 2)
        x = F.adaptive_avg_pool2d(x, (2, 2))
        x = x.view(x.size(0), -1)
        x = F.dropout(F.leaky_relu(self.hidden(x)), 0.2, self.training)
        return F.log_softmax(self.head(x.reshape(x.shape[0], -1)), dim=1)


def sequence_net() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Conv1d(3, 8, 3),
            nn.BatchNorm1d(8),
            nn.SiLU(),
            nn.Conv1d(8, 8, 3, groups=8),
            nn.AvgPool1d(2),
            nn.Flatten(),
        ),
        *(nn.BatchNorm1d(8 * 6), nn.Linear(8 * 6, 5)),
    )


def volume_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.AdaptiveMaxPool3d(1), nn.Flatten(1), nn.Linear(6, 5)
    )


def grouped_net() -> nn.Module:
    """12 channels in groups of 3 and of 4, so that whole groups of both stay only in steps of 12 of 24."""
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3, groups=8), nn.GroupNorm(6, 24), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)),
    )


IMAGES = (2, 3, 16, 16)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "flatten head": (flatten_head_net, IMAGES, "11"),
    "perceptron": (perceptron, IMAGES, "5"),
    "depthwise": (depthwise_net, IMAGES, "8"),
    "functional": (Functional, IMAGES, "head"),
    "grouped": (grouped_net, IMAGES, "6"),
    "sequence": (sequence_net, (2, 3, 16), "7"),
    "volume": (volume_net, (2, 1, 5, 5, 5), "5"),
    "resnet18": (partial(torchvision.models.resnet18, num_classes=5), (2, 3, 32, 32), "fc"),
    "resnet50": (partial(torchvision.models.resnet50, num_classes=5), (2, 3, 32, 32), "fc"),
    "mobilenet_v2": (partial(torchvision.models.mobilenet_v2, num_classes=5), (2, 3, 32, 32), "classifier.1"),
}
SMALL = [name for name in MODELS if "net" not in name]
every_model = pytest.mark.parametrize("name", MODELS)
small_models = pytest.mark.parametrize("name", SMALL)


def build(name: str, seed: int = 0) -> nn.Module:
    """A model whose normalisation layers have seen data, so that their state matters."""
    return copy.deepcopy(built(name, seed))


@cache
def built(name: str, seed: int) -> nn.Module:
    factory, shape, _ = MODELS[name]
    torch.manual_seed(seed)
    model = factory()
    if name != "depthwise":  # SyncBatchNorm trains on GPUs alone
        with torch.no_grad():
            model.train()(torch.randn(4, *shape[1:]))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    return model.eval()


def inputs(name: str) -> Tensor:
    return torch.randn(MODELS[name][1], generator=torch.Generator().manual_seed(7))


def network_of(name: str, width: float = 0.5) -> ParameterSharingProxy:
    return ParameterSharingProxy(build(name), width).eval()


def shared_layers(network: ParameterSharingProxy) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Name → (model's layer, proxy's layer) of convolutions, linear layers and PReLUs other than the head."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.PReLU)
    return {
        name: (layer, network.proxy.get_submodule(name))
        for name, layer in network.model.named_modules()
        if isinstance(layer, kinds) and name != network.head
    }


# ---- sharing ---------------------------------------------------------------------------------------------------------


@every_model
def test_each_proxy_weight_is_the_leading_slice_of_the_models(name: str) -> None:
    network = network_of(name)
    layers = shared_layers(network)
    assert layers
    for full, slim in layers.values():
        for key, tensor in full.named_parameters():
            part = getattr(slim, key)
            assert part.data_ptr() == tensor.data_ptr()
            assert part.stride() == tensor.stride()
            assert torch.equal(part, tensor[tuple(slice(size) for size in part.shape)])
        assert list(slim.parameters()) == []


@every_model
def test_widths_are_rounded_halves_and_ends_keep_their_size(name: str) -> None:
    network = network_of(name)
    convolutions = [(f, s) for f, s in shared_layers(network).values() if hasattr(f, "out_channels")]
    for full, slim in convolutions:
        if full.groups == 1:
            assert slim.out_channels == max(1, int(full.out_channels / 2 + 0.5))
        assert slim.weight.shape[0] == slim.out_channels
        assert slim.weight.shape[1] == slim.in_channels // slim.groups
    if convolutions:
        assert convolutions[0][1].in_channels == convolutions[0][0].in_channels
    assert network.head == MODELS[name][2]
    assert network.proxy.get_submodule(network.head).out_features == 5


@every_model
def test_the_proxys_own_layers_start_as_the_models_leading_part(name: str) -> None:
    network = network_of(name)
    own = network.proxy.state_dict()
    model = network.model.state_dict()
    assert any(key.startswith(network.head) for key in own)
    for key, value in own.items():
        assert torch.equal(value, model[key][tuple(slice(size) for size in value.shape)]), key
        assert value.numel() == 0 or value.data_ptr() != model[key].data_ptr(), key


@every_model
def test_parameters_and_state_have_no_duplicates_and_miss_nothing(name: str) -> None:
    network = network_of(name)
    places = [(p.data_ptr(), p.shape) for p in network.parameters() if p.numel()]
    assert len(places) == len(set(places))
    state = network.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    own = [key for key, _ in network.proxy.named_parameters()]
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
    norms = [n for n, layer in network.proxy.named_modules() if isinstance(layer, kinds)]
    assert {key.rsplit(".", 1)[0] for key in own} == {network.head, *norms}
    assert len(list(network.parameters())) == len(list(network.model.parameters())) + len(own)


@small_models
def test_a_step_on_the_proxys_loss_moves_the_leading_slices_and_nothing_else_of_the_model(name: str) -> None:
    network = network_of(name)
    before = copy.deepcopy(network.model.state_dict())
    slices = {
        f"{layer}.{key}": tuple(slice(size) for size in getattr(slim, key).shape)
        for layer, (full, slim) in shared_layers(network).items()
        for key, _ in full.named_parameters()
    }
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    F.cross_entropy(network.proxy_logits(inputs(name)), torch.tensor([1, 4])).backward()
    optimizer.step()
    for key, old in before.items():
        new = network.model.state_dict()[key]
        if key not in slices:
            assert torch.equal(new, old), key
            continue
        moved = new != old
        assert moved[slices[key]].any(), key
        moved[slices[key]] = False
        assert not moved.any(), key


@small_models
def test_the_proxys_gradient_is_zero_outside_the_slices(name: str) -> None:
    network = network_of(name)
    F.cross_entropy(network.proxy_logits(inputs(name)), torch.tensor([1, 4])).backward()
    shared = {id(p) for full, _ in shared_layers(network).values() for p in full.parameters()}
    for full, slim in shared_layers(network).values():
        for key, tensor in full.named_parameters():
            assert tensor.grad is not None
            outside = tensor.grad.clone()
            outside[tuple(slice(size) for size in getattr(slim, key).shape)] = 0
            assert not outside.any()
    for parameter in network.model.parameters():
        assert parameter.grad is None or id(parameter) in shared


@every_model
def test_the_joint_loss_reaches_every_parameter(name: str) -> None:
    network = network_of(name)
    labels = torch.tensor([1, 4])
    logits, proxy_logits = network(inputs(name))
    assert logits.shape == proxy_logits.shape == (2, 5)
    (F.cross_entropy(logits, labels) + F.cross_entropy(proxy_logits, labels)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_training_mode_keeps_the_running_statistics_apart() -> None:
    network = network_of("flatten head").train()
    model = copy.deepcopy(network.model[1].state_dict())
    proxy = copy.deepcopy(network.proxy[1].state_dict())
    network.proxy_logits(inputs("flatten head"))
    assert all(torch.equal(network.model[1].state_dict()[key], value) for key, value in model.items())
    assert not torch.equal(network.proxy[1].running_mean, proxy["running_mean"])


def test_the_users_model_stays_untouched() -> None:
    model = build("functional")
    names, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(layer)) for name, layer in names.items()}
    random = torch.get_rng_state()
    network = ParameterSharingProxy(model, 0.5)
    assert network.model is model
    assert torch.equal(torch.get_rng_state(), random), "no random number is drawn"
    assert dict(model.named_modules()) == names
    assert {name: set(vars(layer)) for name, layer in names.items()} == attributes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_hooks_stay_with_the_model() -> None:
    model, seen = build("flatten head"), list[str]()
    model.register_forward_hook(lambda *_: seen.append("whole"))
    model[0].register_forward_hook(lambda *_: seen.append("layer"))
    network = ParameterSharingProxy(model, 0.5).eval()
    network.proxy_logits(inputs("flatten head"))
    network.slim()(inputs("flatten head"))
    assert seen == []
    network(inputs("flatten head"))
    assert seen == ["layer", "whole"]


# ---- the slim network ------------------------------------------------------------------------------------------------


@every_model
def test_proxy_equals_its_slim_network_bit_for_bit(name: str) -> None:
    network = network_of(name)
    slim = network.slim().eval()
    x = inputs(name)
    assert torch.equal(network.proxy_logits(x), slim(x))
    assert torch.equal(network(x)[1], slim(x))
    assert torch.equal(network(x)[0], network.model(x))


@every_model
def test_the_proxy_is_the_model_with_all_other_channels_cut(name: str) -> None:
    """The model whose weights outside the slices are zero computes what the proxy does: no channel is mistaken."""
    network = network_of(name)
    cut, slim = copy.deepcopy(network.model).double(), network.slim().state_dict()
    with torch.no_grad():
        for key, parameter in cut.named_parameters():
            inside = torch.zeros_like(parameter, dtype=torch.bool)
            inside[tuple(slice(size) for size in slim[key].shape)] = True
            parameter.mul_(inside)
    x = inputs(name).double()
    torch.testing.assert_close(network.double().proxy_logits(x), cut(x), rtol=1e-9, atol=1e-9)


@every_model
def test_slim_is_a_plain_module_of_its_own_with_the_models_names(name: str) -> None:
    network = network_of(name)
    slim = network.slim()
    assert list(slim.state_dict()) == list(network.model.state_dict())
    assert [type(layer) for layer in slim.modules()] == [type(layer) for layer in network.model.modules()]
    mine = {tensor.data_ptr() for tensor in network.state_dict().values()}
    for key, tensor in slim.state_dict().items():
        assert tensor.is_contiguous(), key
        assert tensor.data_ptr() not in mine, key
    before = network.proxy_logits(inputs(name))
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.zero_()
    assert torch.equal(network.proxy_logits(inputs(name)), before)


@every_model
def test_saved_and_loaded_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    network = network_of(name)
    with torch.no_grad():  # its own layers have moved away from the model's
        for parameter in network.proxy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path / "slim.safetensors"
    network.save(path, epoch=3)
    loaded = slim_architecture(build(name, seed=1), 0.5)
    loaded.load_state_dict(load_file(path), strict=True)
    assert torch.equal(loaded.eval()(inputs(name)), network.proxy_logits(inputs(name)))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "format": "dynams-slim",
            "width": "0.5",
            "head": MODELS[name][2],
            "classes": "5",
            "epoch": "3",
        }


def test_an_unknown_epoch_is_not_written(tmp_path: Path) -> None:
    network_of("perceptron").save(tmp_path / "new folder" / "slim.safetensors")
    with safe_open(tmp_path / "new folder" / "slim.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "width", "head", "classes"}
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["slim.safetensors"]


def test_tied_layers_can_be_slimmed_and_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[3].weight = model[1].weight
    network = ParameterSharingProxy(model, 0.5).eval()
    network.save(tmp_path / "slim.safetensors")
    loaded = slim_architecture(model, 0.5)
    loaded.load_state_dict(load_file(tmp_path / "slim.safetensors"), strict=True)
    x = torch.randn(4, 6)
    assert torch.equal(loaded(x), network.proxy_logits(x))


def test_a_tie_between_layers_of_different_slim_sizes_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    model[1].weight = model[0].weight  # the first keeps its inputs, the second does not
    with pytest.raises(UnsupportedLayerError, match="1: it shares its weight"):
        ParameterSharingProxy(model, 0.5)


def test_flops_of_a_slim_resnet_are_about_the_square_of_the_width() -> None:
    """p² of every convolution between hidden layers, but p of the first (3 input channels) and of the head (5 classes).

    For ResNet-18 the first convolution is 6.5 % of the whole at this size, so that ¼ becomes about 0.266.
    """
    network = network_of("resnet18")
    x = torch.randn(1, 3, 224, 224)

    def flops(module: nn.Module) -> dict[str, int]:
        with torch.no_grad(), FlopCounterMode(display=False, depth=9) as counter:
            module(x)
        prefix = type(module).__name__ + "."
        counts = {key.removeprefix(prefix): sum(value.values()) for key, value in counter.get_flop_counts().items()}
        return counts | {"": counter.get_total_flops()}

    full, slim = flops(network.model), flops(network.slim())
    ends = full["conv1"] + full["fc"]
    assert slim["conv1"] / full["conv1"] == slim["fc"] / full["fc"] == 0.5
    assert slim[""] == 0.25 * (full[""] - ends) + 0.5 * ends
    assert slim[""] / full[""] == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("width", [0.01, 0.2, 0.3, 0.75, 1.0])
@small_models
def test_any_width_works(name: str, width: float) -> None:
    network = network_of(name, width)
    assert network.width == width
    x = inputs(name)
    assert torch.equal(network.proxy_logits(x), network.slim()(x))
    for full, slim in shared_layers(network).values():
        if isinstance(full, nn.Linear):
            assert slim.out_features == max(1, int(width * full.out_features + 0.5))
    if width == 1.0:
        assert torch.equal(network(x)[0], network(x)[1])


def test_width_one_is_the_models_own_architecture_whatever_its_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    twin = slim_architecture(model, 1)
    x = torch.randn(2, 6)
    assert torch.equal(twin(x), model(x))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("width", [0, -0.5, 1.01, float("nan"), "0.5", True])
def test_widths_outside_are_refused(width: Any) -> None:
    with pytest.raises(UsageError, match="width is"):
        ParameterSharingProxy(perceptron(), width)
    with pytest.raises(UsageError, match="width is"):
        slim_architecture(perceptron(), width)


# ---- copies, moves, state --------------------------------------------------------------------------------------------


def copied(network: ParameterSharingProxy) -> ParameterSharingProxy:
    return copy.deepcopy(network)


def pickled(network: ParameterSharingProxy) -> ParameterSharingProxy:
    return pickle.loads(pickle.dumps(network))


@pytest.mark.parametrize("duplicate", [copied, pickled])
@pytest.mark.parametrize("name", ["flatten head", "functional", "resnet18"])
def test_copies_share_within_themselves(name: str, duplicate: Callable[[Any], ParameterSharingProxy]) -> None:
    network = network_of(name)
    x = inputs(name)
    before = network(x)
    twin = duplicate(network)
    assert all(torch.equal(a, b) for a, b in zip(twin(x), before, strict=True))
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.add_(0.05)
    assert not torch.equal(twin.proxy_logits(x), before[1]), "the copy's proxy follows the copy's model"
    assert all(torch.equal(a, b) for a, b in zip(network(x), before, strict=True)), "the original follows neither"
    for full, slim in shared_layers(twin).values():
        assert slim.weight.data_ptr() == full.weight.data_ptr()


@pytest.mark.parametrize("name", ["flatten head", "functional", "resnet18"])
def test_state_dict_round_trip(name: str) -> None:
    network = network_of(name)
    other = ParameterSharingProxy(build(name, seed=5), 0.5).eval()
    assert not torch.equal(other(inputs(name))[1], network(inputs(name))[1])
    other.load_state_dict(network.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other(inputs(name)), network(inputs(name)), strict=True))


def test_moving_and_loading_the_model_keep_sharing() -> None:
    network = network_of("flatten head").double()
    x = inputs("flatten head").double()
    assert network(x)[1].dtype == torch.float64
    network.model.load_state_dict({key: value * 0 for key, value in network.model.state_dict().items()})
    assert not network.proxy[0].weight.any()
    network.model[0].weight = nn.Parameter(torch.ones_like(network.model[0].weight))  # a replaced tensor counts too
    assert network.proxy[0].weight.eq(1).all()


def test_autocast_computes_both() -> None:
    network = network_of("flatten head").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, proxy_logits = network(inputs("flatten head"))
    assert logits.dtype == proxy_logits.dtype == torch.bfloat16
    (logits.float().sum() + proxy_logits.float().sum()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


@pytest.mark.parametrize("name", ["resnet18", "grouped", "attention"])
def test_compiled_it_computes_the_same(name: str) -> None:
    network = ParameterSharingProxy(Attention()).eval() if name == "attention" else network_of(name)
    x, labels = torch.randn(IMAGES), torch.tensor([1, 4])
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (network, compiled):
        network.zero_grad(set_to_none=True)
        joint_loss(F.cross_entropy, run(x), labels).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["depthwise", "grouped", "resnet18"])
def test_channels_last_computes_the_same(name: str) -> None:
    network = network_of(name)
    expected = network(inputs(name))
    found = network.to(memory_format=torch.channels_last)(inputs(name).to(memory_format=torch.channels_last))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for full, slim in shared_layers(network).values():
        assert slim.weight.data_ptr() == full.weight.data_ptr()


# ---- the proxy in each n-th step -------------------------------------------------------------------------------------


def test_the_proxy_takes_part_in_each_nth_training_step_alone() -> None:
    network = ParameterSharingProxy(build("perceptron"), every=3).train()
    x, labels = inputs("perceptron"), torch.tensor([1, 4])
    took_part = []
    for _ in range(7):
        network.zero_grad(set_to_none=True)
        joint_loss(F.cross_entropy, network(x), labels).backward()
        own = [parameter.grad is not None for parameter in network.proxy.parameters()]
        assert all(own) or not any(own)
        assert all(parameter.grad is not None for parameter in network.model.parameters())
        took_part.append(own[0])
    assert took_part == [True, False, False, True, False, False, True]
    network.eval()
    assert all(network(x)[1] is not None for _ in range(4)), "evaluation is not a step"
    compiled = torch.compile(ParameterSharingProxy(build("perceptron"), every=2).train(), backend="eager")
    assert [compiled(x)[1] is not None for _ in range(5)] == [True, False, True, False, True]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_other_step_counts_are_refused(every: Any) -> None:
    with pytest.raises(UsageError, match="every is"):
        ParameterSharingProxy(perceptron(), every=every)


def test_the_joint_loss_weighs_the_proxy() -> None:
    logits, proxy_logits, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    alone = [F.cross_entropy(one, labels) for one in (logits, proxy_logits)]
    assert joint_loss(F.cross_entropy, (logits, proxy_logits), labels) == alone[0] + alone[1]
    assert joint_loss(F.cross_entropy, (logits, proxy_logits), labels, proxy_weight=0.25) == alone[0] + 0.25 * alone[1]
    assert joint_loss(F.cross_entropy, (logits, None), labels) == alone[0]


def test_frozen_parameters_stay_frozen() -> None:
    model = build("flatten head")
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    network = ParameterSharingProxy(model, 0.5)
    assert not network.proxy[0].weight.requires_grad
    assert not network.proxy[1].weight.requires_grad
    assert not network.slim()[0].weight.requires_grad
    assert network.slim()[8].weight.requires_grad


def _train(rank: int, address: str, folder: str, every: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(rank)  # ranks that start apart are made equal by DDP
    network = ParameterSharingProxy(grouped_net(), 0.5, every=every)
    wrapped = nn.parallel.DistributedDataParallel(network, find_unused_parameters=every > 1)
    _train_steps(wrapped, network, slice(rank, None, 2))
    torch.save(network.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _train_steps(callable_network: nn.Module, network: ParameterSharingProxy, mine: slice) -> None:
    """Five steps with weight decay and momentum, on part of each batch."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(5):
        x, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.randint(5, (8,), generator=generator)
        optimizer.zero_grad()
        joint_loss(F.cross_entropy, callable_network(x[mine]), labels[mine]).backward()
        optimizer.step()


@pytest.mark.parametrize("every", [1, 2])
def test_two_ranks_train_as_one_and_stay_in_sync(tmp_path: Path, every: int) -> None:
    arguments = (f"file://{tmp_path}/meet", str(tmp_path), every)
    torch.multiprocessing.spawn(_train, arguments, nprocs=2)
    torch.manual_seed(0)
    alone = ParameterSharingProxy(grouped_net(), 0.5, every=every)
    _train_steps(alone, alone, slice(None))
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(states[0][name], states[1][name]), f"{name} is the same on both ranks"


def _shard(rank: int, address: str, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def sharded(model: nn.Module) -> nn.Module:
        for layer in model:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        return model

    with pytest.raises(ShardedModelError) as made:
        ParameterSharingProxy(sharded(perceptron()))
    network = ParameterSharingProxy(perceptron())
    sharded(network.model)
    fully_shard(network, mesh=mesh)  # now each layer's parameters are whole during its own forward alone
    with pytest.raises(ShardedModelError) as called:
        network(inputs("perceptron"))
    messages = [str(made.value), str(called.value)]
    Path(folder, f"{rank}.txt").write_text("\n".join(messages))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # at an orderly end torch's threads of the pass that was cut short abort the process now and then


def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_shard, (f"file://{tmp_path}/meet", str(tmp_path)), nprocs=2)
    for rank in range(2):
        made, called = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert made.startswith("1.weight (FSDPLinear) is sharded"), made
        assert called.startswith("1.weight (FSDPLinear) is sharded"), called


# ---- the head --------------------------------------------------------------------------------------------------------


@every_model
def test_the_head_is_found_in_both_modes(name: str) -> None:
    model = build(name)
    assert find_head(model.eval()) == find_head(model.train()) == MODELS[name][2]


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.head(x), x


class ControlFlow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class ScaledOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.normalize(self.last(self.body(x)), dim=1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(6, 3), nn.Softmax(1)), r"comes from 1 \(Softmax\).*head="),
        (nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten()), r"comes from 0 \(Conv2d\)"),
        (ScaledOutput(), r"comes from mul\(\)"),
        (TwoOutputs(), "returns a tuple.*logits alone"),
        (nn.Linear(6, 3), "nn.Sequential"),
        (nn.Sequential(nn.Linear(6, 6), ControlFlow(), nn.Linear(6, 3)), r"1 \(ControlFlow\).*head="),
    ],
)
def test_a_head_that_is_not_found_asks_to_be_named(model: nn.Module, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        find_head(model)


def test_a_named_head_is_taken() -> None:
    model = ScaledOutput().eval()
    network = ParameterSharingProxy(model, 0.5, head="last")
    assert network.head == "last"
    x = torch.randn(4, 6)
    assert torch.equal(network(x)[1], network.slim()(x))
    assert torch.equal(slim_architecture(model, 0.5, head="last")(x), network(x)[1])


@pytest.mark.parametrize(
    ("model", "head", "message"),
    [
        (perceptron(), "fc", "head='fc' is no layer.* 1, 3, 5"),
        (perceptron(), "2", "head='2' is a GELU"),
        (perceptron(), "", "head='' is a Sequential"),
        (perceptron(), "3", "returns .*not the output of the head '3'"),
        (TwoOutputs(), "head", "returns body.*logits alone"),
    ],
)
def test_a_wrongly_named_head_is_refused(model: nn.Module, head: str, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        ParameterSharingProxy(model, 0.5, head=head)


# ---- what cannot be slimmed ------------------------------------------------------------------------------------------


class Custom(nn.Module):
    """A small convolutional net with one odd operation in the middle."""

    def __init__(self, odd: Callable[[Any], Any], features: int = 8, **layers: nn.Module) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(features, 5)
        self.odd = odd
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odd(self.conv(x)))


class OwnParameter(nn.Module):
    """A scale for each channel, through a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x * self.function(self.gamma)


class Scaled(nn.Module):
    """A parameter that is multiplied with what comes."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MixedGroups(nn.Module):
    """Two times 6 channels in groups of 4: the middle group has some of both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(12, 12, 1, groups=3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(self.grouped(torch.cat([x, x], 1)).mean((2, 3)))


class ConcatenatedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.conv(x)], 1).mean((2, 3)))


class Attention(nn.Module):
    """Attention from four tokens to all of another convolution's."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.conv, self.other, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        query, key = (conv(x).flatten(2).transpose(1, 2) for conv in (self.conv, self.other))
        return self.head(self.attention(query.relu()[:, :4], key, key)[0].mean(1))


class TwiceUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.mix(x)))


class ChannelResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.conv(x)).mean((2, 3)))


def pooled(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(6, 8), Scaled((1, 1, 8)), nn.Linear(8, 5)), r"1 \(Scaled\): mul\(\).*in 2 dimensions"),
        (pooled(Scaled((4, 1, 1))), r"1 \(Scaled\): mul\(\).*parameter of shape \(4, 1, 1\)"),
        (MixedGroups(), r"grouped \(Conv2d\).*groups of 4 channels mix"),
        (pooled(nn.ConvTranspose2d(8, 8, 3)), r"1 \(ConvTranspose2d\).*no rule"),
        (pooled(nn.ChannelShuffle(2)), r"1 \(ChannelShuffle\).*no rule"),
        (pooled(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))), r"1 \(ParametrizedConv2d\).*plain weight"),
        (pooled(OwnParameter(torch.exp)), r"1 \(OwnParameter\): exp\(\).*no rule"),
        (pooled(ControlFlow()), r"1 \(ControlFlow\).*cannot be traced"),
        (pooled(nn.LayerNorm(14)), r"1 \(LayerNorm\).*last 1 dimensions, which do not hold"),
        (nn.Sequential(nn.Embedding(6, 8), nn.Flatten(), nn.Linear(8, 5)), r"0 \(Embedding\).*not supported"),
        (nn.Sequential(nn.Linear(6, 8), nn.Bilinear(8, 8, 4), nn.Linear(4, 5)), r"1 \(Bilinear\)"),
        (ConcatenatedInput(), r"\(ConcatenatedInput\): cat\(\).*beside a tensor that keeps its full size"),
        (Custom(lambda x: x.view(-1, 8 * 256), 8 * 256), r"view\(\).*\(-1, 2048\) do not follow.*torch.flatten"),
        (Custom(lambda x: x.reshape(x.size(0), 8 * 256), 8 * 256), r"reshape\(\).*2048"),
        (Custom(lambda x: x.permute(0, 2, 3, 1).flatten(1), 8 * 256), r"flatten\(\).*channel's values together"),
        (Custom(lambda x: x.mean(1).flatten(1), 256), r"mean\(\).*not over spatial ones"),
        (Custom(lambda x: x.mean().view(1, 1)), r"mean\(\).*all dimensions"),
        (Custom(lambda x: F.adaptive_avg_pool2d(x, 1).squeeze()), r"squeeze\(\).*all dimensions"),
        (Custom(lambda x: torch.flatten(x)), r"flatten\(\).*dimension 1"),
        (Custom(lambda x: x[:, 2:6, 0, 0], 4), r"getitem\(\).*some channels"),
        (Custom(lambda x: x.chunk(2, 1)[0].mean((2, 3)), 4), r"chunk\(\).*some channels"),
        (Custom(lambda x: x, 16), r"head \(Linear\).*spatial dimension"),
        (Custom(lambda x: x.mean((2, 3)), 16), r"head \(Linear\).*16 features, but gets 8 channels"),
        (Custom(lambda x: F.softmax(x, 1).mean((2, 3))), r"softmax\(\).*no rule"),
        (Custom(lambda x: x.mean((2, 3)), spare=nn.Linear(8, 8)), r"spare\.weight.*not used"),
        (TwiceUsed(), r"mix \(Linear\).*used twice"),
        (ChannelResidual(), r"the model \(ChannelResidual\): add\(\).*keeps its full size"),
    ],
)
def test_what_cannot_be_slimmed_is_named(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=message):
        ParameterSharingProxy(model, 0.5, head=None if hasattr(model, "classifier") else last_linear(model))
    with pytest.raises(UnsupportedLayerError, match=r"width=1"):
        slim_architecture(model, 0.5, head=last_linear(model))


def last_linear(model: nn.Module) -> str:
    return [name for name, layer in model.named_modules() if type(layer) is nn.Linear and name != "spare"][-1]


class OneLayer(nn.Module):
    """A body, one layer that returns a tuple, and a head."""

    def __init__(self, layer: nn.Module, calls: int) -> None:
        super().__init__()
        self.body, self.middle, self.head, self.calls = nn.Linear(6, 8), layer, nn.Linear(8, 5), calls

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(*[self.body(x)] * self.calls)[0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OneLayer(nn.LSTM(8, 8), 1), r"middle \(LSTM\).*recurrent layers are not supported"),
        (OneLayer(nn.MultiheadAttention(8, 2), 3), r"middle \(MultiheadAttention\).*takes \(batch, tokens, 8\)"),
        (Attention(add_bias_kv=True), r"attention \(MultiheadAttention\).*same channels"),
        (OneLayer(nn.Bilinear(8, 8, 8), 2), r"middle \(Bilinear\)"),
        (OneLayer(nn.MaxPool1d(2, return_indices=True), 1), r"middle \(MaxPool1d\)"),
    ],
)
def test_layers_of_several_inputs_or_outputs_are_named(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=message):
        ParameterSharingProxy(model)
