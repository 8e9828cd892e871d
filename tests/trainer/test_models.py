"""Networks: published sizes, shapes, initial weights, memory format."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ltkernels.nn import CosineLinear
from ltkernels.trainer import TrainerError
from ltkernels.trainer.models import MODELS, build_model

SHIPPED = ("resnet32", "resnet18", "small-cnn")


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def build(name, **changes):
    return build_model(name, **({"in_channels": 3, "num_classes": 10, "classifier": "linear"} | changes))


@pytest.mark.parametrize(
    ("name", "num_classes", "classifier", "count"),
    [
        ("resnet32", 10, "linear", 464_154),
        ("resnet32", 100, "linear", 470_004),
        ("resnet32", 10, "cosine", 464_144),
        ("resnet32", 100, "cosine", 469_904),
        ("resnet18", 10, "linear", 11_173_962),
        ("resnet18", 100, "linear", 11_220_132),
    ],
)
def test_published_parameter_counts(name, num_classes, classifier, count):
    assert parameters(build(name, num_classes=num_classes, classifier=classifier)) == count


def test_the_small_network_is_small():
    assert 250_000 < parameters(build("small-cnn", in_channels=1)) < 350_000


def test_every_network_is_tested():
    assert MODELS.keys() == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("classifier", ["linear", "cosine"])
@pytest.mark.parametrize(("in_channels", "side"), [(3, 32), (1, 28)])
def test_interface(name, classifier, in_channels, side):
    network = build(name, in_channels=in_channels, num_classes=7, classifier=classifier, width=0.5).eval()
    images = torch.randn(5, in_channels, side, side)
    embeddings = network.features(images)
    assert embeddings.shape == (5, network.embedding_dim)
    logits = network(images)
    assert logits.shape == (5, 7)
    assert torch.equal(logits, network.classifier(embeddings))
    if classifier == "cosine":
        expected = F.cosine_similarity(embeddings[:, None], network.classifier.weight[None], dim=2)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHIPPED)
def test_width_is_a_factor_on_the_channels(name):
    whole, half = build(name), build(name, width=0.5)
    assert half.embedding_dim == whole.embedding_dim / 2
    for wide, narrow in zip(whole.modules(), half.modules(), strict=True):
        if isinstance(wide, nn.BatchNorm2d):
            assert narrow.num_features == wide.num_features / 2
    assert build("resnet18", width=2.0).embedding_dim == 1024


def published_resnet32(network, images):
    """Forward pass written out after the code of LDAM, with the weights of ``network``; batch statistics."""

    def normalise(x, norm):
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]
        return (x - mean) / (variance + norm.eps).sqrt() * weight + bias

    modules = [m for m in network.backbone.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    convolutions, norms = modules[0::2], modules[1::2]
    assert len(convolutions) == 31
    x = torch.relu(normalise(F.conv2d(images, convolutions[0].weight, padding=1), norms[0]))
    for k in range(15):
        stride = 2 if k in (5, 10) else 1
        first, second = 2 * k + 1, 2 * k + 2
        out = F.conv2d(x, convolutions[first].weight, stride=stride, padding=1)
        out = torch.relu(normalise(out, norms[first]))
        out = normalise(F.conv2d(out, convolutions[second].weight, padding=1), norms[second])
        if stride == 2:
            planes = out.shape[1]
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0)
        x = torch.relu(out + x)
    pooled = F.avg_pool2d(x, x.shape[3]).flatten(1)
    return pooled @ network.classifier.weight.T + network.classifier.bias


def test_resnet32_is_the_published_network():
    torch.manual_seed(0)
    network = build("resnet32").double().train()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(images), published_resnet32(network, images))


def test_resnet32_is_drawn_by_hes_rule():
    torch.manual_seed(0)
    network = build("resnet32", num_classes=100)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.numel() > 2000:
            expected = math.sqrt(2 / module.weight[0].numel())
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)
            assert module.weight.abs().max() > 2.5 * expected  # normal, not uniform


def test_resnet18_is_drawn_by_hes_rule_with_fan_out():
    torch.manual_seed(0)
    for module in build("resnet18").modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_classifier_does_not_change_the_backbone(name):
    networks = []
    for classifier in ("linear", "cosine"):
        torch.manual_seed(3)
        networks.append(build(name, classifier=classifier))
    linear, cosine = networks
    assert isinstance(linear.classifier, nn.Linear) and isinstance(cosine.classifier, CosineLinear)
    for one, other in zip(linear.backbone.parameters(), cosine.backbone.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", SHIPPED)
def test_channels_last_stays_and_changes_nothing(name):
    torch.manual_seed(0)
    network = build(name, width=0.5)
    images = torch.randn(4, 3, 32, 32)
    expected = network(images)
    network = network.to(memory_format=torch.channels_last)
    formats = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _m, _i, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    logits = network(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert len(formats) > 2 and all(formats)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_one_graph_without_breaks(name):
    network = build(name, width=0.25)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), network(images))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "resnet50"}, "expected one of resnet32, resnet18, small-cnn, got 'resnet50'"),
        ({"classifier": "bilinear"}, "classifier: expected one of linear, cosine"),
        ({"width": 0.0}, "width"),
        ({"width": 0.01}, "width"),
        ({"width": float("inf")}, "width"),
        ({"width": float("nan")}, "width"),
    ],
)
def test_bad_settings_are_named(changes, named):
    with pytest.raises(TrainerError, match=named):
        build(**({"name": "resnet32"} | changes))
