"""Fused networks compute what they did; what must not be fused is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import toy_models
from dynams_stream.fusing import fuse_convolutions
from dynams_stream.scorer import Scorer, ScorerSpec


def settled(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics and affine parameters that matter."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats:
            layer.running_mean.normal_(std=0.2)
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet18", 20), ("mobilenet_v3_small", 34), ("vgg11_bn", 8), ("densenet121", 59), ("convnext_tiny", 0)],
)
def test_logits_change_by_rounding_alone(name: str, count: int) -> None:
    model = settled(getattr(models, name)(num_classes=5))
    x = torch.randn(2, 3, 32, 32)
    fused = copy.deepcopy(model)
    assert fuse_convolutions(fused) == count
    before = sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules()) == before - count
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.double()(x.double()), model.double()(x.double()), rtol=1e-5, atol=1e-6)


class Shared(nn.Module):
    """One convolution that feeds two layers, one that is called twice, one with statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.c, self.norm_c = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.d, self.norm_d = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.norm_a(x)
        x = self.norm_b(self.b(self.norm_b(self.b(x))))
        x = self.norm_d(self.d(self.norm_c(self.c(x))))
        return self.head(x.mean((2, 3)))


def test_what_is_used_otherwise_is_left_alone() -> None:
    model = settled(Shared())
    fused = copy.deepcopy(model)
    assert fuse_convolutions(fused) == 1
    assert isinstance(fused.norm_d, nn.Identity)
    x = torch.randn(6, 3, 4, 4)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    hooked = copy.deepcopy(model)
    hooked.d.register_forward_hook(lambda *_: None)
    assert fuse_convolutions(hooked) == 0


def test_a_network_that_cannot_be_traced_stays() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = toy_models.small_cnn()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if x.sum() > 0 else -self.body(x)

    assert fuse_convolutions(Deciding().eval()) == 0
    with pytest.raises(ValueError, match="evaluation mode"):
        fuse_convolutions(toy_models.small_cnn())


def test_the_scorer_runs_a_fused_network_with_the_same_scores() -> None:
    spec = ScorerSpec(model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray", width=0.5)
    torch.manual_seed(0)
    scorer = Scorer(spec, None)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in scorer.network.modules())
    assert not scorer.network.training
    x, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    found = scorer.score(x, labels)
    assert torch.equal(found.predicted, scorer.network(x).argmax(1))
