"""Post-hoc methods: formulas, what they leave alone, the tail they lift, and the files beside a run."""

import copy
import dataclasses
import json
import math

import pytest
import torch

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

import tiny_images  # noqa: E402, F401
from tiny_images import COUNTS  # noqa: E402

from ltkernels.nn import CosineLinear  # noqa: E402
from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.cli import main  # noqa: E402
from ltkernels.trainer.metrics import score  # noqa: E402
from ltkernels.trainer.posthoc import POST_HOC, Frozen, PostHocOptions, crt, freeze, lws  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = PostHocOptions(steps=200, batch_size=64)
TAIL_COUNTS = (300, 30, 3)


def some_features(counts, seed):
    """Three overlapping clusters in the plane."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    centres = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-1.0, -1.0]])
    return centres[labels] + torch.randn(len(labels), 2, generator=generator), labels


@pytest.fixture
def frozen():
    """A linear classifier trained with cross-entropy on a long-tailed set, by torch's own optimiser."""
    torch.manual_seed(0)
    features, labels = some_features(TAIL_COUNTS, seed=0)
    test_features, test_target = some_features((200, 200, 200), seed=1)
    classifier = torch.nn.Linear(2, 3)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(classifier(features), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return Frozen(
        classifier=classifier,
        new_classifier=lambda: torch.nn.Linear(2, 3),
        scale=1.0,
        features=torch.stack([features, features + 0.1 * torch.randn(features.shape)]),
        labels=labels,
        counts=TAIL_COUNTS,
        test_features=test_features,
        test_target=test_target,
    )


def scores_of(frozen, logits):
    return score(logits.detach().softmax(1), frozen.test_target, frozen.counts)


def test_logit_adjustment(frozen):
    prior = torch.tensor(TAIL_COUNTS).float() / sum(TAIL_COUNTS)
    expected = frozen.classifier(frozen.test_features) - 0.7 * prior.log()
    options = dataclasses.replace(OPTIONS, prior_tau=0.7)
    torch.testing.assert_close(POST_HOC["logit-adjustment"](frozen, options), expected)
    scaled = dataclasses.replace(frozen, scale=30.0)  # the prior belongs to what the softmax sees
    expected = frozen.classifier(frozen.test_features) - 0.7 * prior.log() / 30
    torch.testing.assert_close(POST_HOC["logit-adjustment"](scaled, options), expected, rtol=1e-4, atol=1e-5)


def test_tau_normalisation(frozen):
    weight = frozen.classifier.weight
    for tau in (0.0, 0.5, 1.0):
        logits = POST_HOC["tau-norm"](frozen, dataclasses.replace(OPTIONS, norm_tau=tau))
        for k in range(3):
            vector = weight[k] / (weight[k] ** 2).sum().sqrt() ** tau
            torch.testing.assert_close(logits[:, k], (frozen.test_features * vector).sum(1))


def test_tau_normalisation_leaves_cosines_alone(frozen):
    cosine = dataclasses.replace(frozen, classifier=CosineLinear(2, 3))
    logits = POST_HOC["tau-norm"](cosine, OPTIONS)
    torch.testing.assert_close(logits, cosine.classifier(frozen.test_features))


@pytest.mark.parametrize("name", POST_HOC)
def test_every_method_lifts_the_tail(frozen, name):
    before = scores_of(frozen, frozen.classifier(frozen.test_features))
    after = scores_of(frozen, POST_HOC[name](frozen, OPTIONS))
    assert after.few > before.few + 3
    assert after.overall > before.overall


def test_crt_is_the_classifier_of_balanced_classes(frozen):
    """With class-balanced samples it learns what a balanced set of the same images would teach."""
    big = dataclasses.replace(OPTIONS, steps=1500, weight_decay=0.0)
    logits = crt(frozen, big).detach()
    classifier = torch.nn.Linear(2, 3)
    weight = 1 / torch.tensor(TAIL_COUNTS).float()
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200)
    labels = frozen.labels.repeat(2)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(classifier(frozen.features.flatten(0, 1)), labels, weight)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = classifier(frozen.test_features)
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() > 0.97


def test_crt_starts_anew_and_depends_on_its_seed_only(frozen):
    first = crt(frozen, OPTIONS)
    torch.rand(3)
    assert torch.equal(crt(frozen, OPTIONS), first)
    other = dataclasses.replace(frozen, classifier=torch.nn.Linear(2, 3))
    assert torch.equal(crt(other, OPTIONS), first)
    assert not torch.equal(crt(frozen, dataclasses.replace(OPTIONS, seed=1)), first)


def test_crt_is_trained_by_sgd_along_half_a_cosine(frozen):
    """One image, which every draw gives, so that the steps can be taken by hand in float64."""
    image = torch.tensor([0.5, -1.0])
    one = dataclasses.replace(frozen, features=image.view(1, 1, 2), labels=torch.tensor([0]))
    found = crt(one, dataclasses.replace(OPTIONS, steps=4, batch_size=3, lr=0.3, weight_decay=0.1))
    torch.manual_seed(OPTIONS.seed)
    weights = [parameter.detach().double() for parameter in torch.nn.Linear(2, 3).parameters()]
    velocity = [torch.zeros_like(weight) for weight in weights]
    for step in range(4):
        logit_gradient = (weights[0] @ image.double() + weights[1]).softmax(0) - torch.tensor([1.0, 0.0, 0.0])
        gradients = [logit_gradient[:, None] * image, logit_gradient]
        velocity = [0.9 * v + g + 0.1 * w for v, g, w in zip(velocity, gradients, weights, strict=True)]
        lr = 0.3 * (1 + math.cos(math.pi * step / 4)) / 2
        weights = [w - lr * v for w, v in zip(weights, velocity, strict=True)]
    expected = frozen.test_features.double() @ weights[0].T + weights[1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_lws_scales_the_logits_of_each_class(frozen):
    classifier = copy.deepcopy(frozen.classifier.state_dict())
    logits, plain = lws(frozen, OPTIONS).detach(), frozen.classifier(frozen.test_features).detach()
    factors = (logits / plain).median(dim=0).values
    torch.testing.assert_close(logits, plain * factors, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(factors, torch.ones(3), atol=1e-2)
    assert all(torch.equal(classifier[name], tensor) for name, tensor in frozen.classifier.state_dict().items())


def test_a_diverging_classifier_is_told(frozen):
    with pytest.raises(TrainerError, match="lr: the classifier diverged"):
        crt(frozen, dataclasses.replace(OPTIONS, lr=1e38))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("methods", ()),
        ("methods", ("crt", "crt")),
        ("passes", 0),
        ("steps", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("norm_tau", -1.0),
        ("prior_tau", float("nan")),
        ("weight_decay", -1.0),
        ("lr", 0.0),
    ],
)
def test_bad_options_are_named(field, value):
    with pytest.raises(TrainerError, match=f"{field}: expected"):
        dataclasses.replace(OPTIONS, **{field: value})


@pytest.mark.parametrize("method", ["ce", "ldam-drw"])
def test_scores_are_saved_beside_the_run(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cpu = ["--accelerator", "cpu"]
    assert main(["train", f"tiny-{method}", "--out", "run", "--no-tensorboard", "--ema-decay", "0.5", *cpu]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    frozen = freeze(tmp_path / "run", PostHocOptions(passes=2, accelerator="cpu"))
    assert frozen.features.shape == (2, 70, 16) and frozen.counts == COUNTS
    assert frozen.scale == (30.0 if method == "ldam-drw" else 1.0)
    logits = frozen.scale * frozen.classifier(frozen.test_features).detach()
    assert scores_of(frozen, logits).overall == pytest.approx(metrics["last"]["overall"])

    assert main(["posthoc", "run", "--steps", "20", "--prior-tau", "0", *cpu]) == 0
    out = capsys.readouterr().out
    for name in POST_HOC:
        saved = json.loads((tmp_path / "run" / f"posthoc-{name}.json").read_text())
        assert saved["method"] == name and len(saved["scores"]["per_class"]) == 4
        assert saved["settings"]["steps"] == 20 and f"{name}: overall" in out
        if name == "logit-adjustment":  # tau 0 changes nothing
            assert saved["scores"]["overall"] == pytest.approx(metrics["last"]["overall"])
            assert saved["scores"]["ece"] == pytest.approx(metrics["last"]["ece"], rel=1e-3)


@pytest.mark.parametrize("images", ["train_fingerprint", "test_fingerprint"])
def test_other_images_than_those_of_the_run_are_refused(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny-ce", "--out", "run", "--no-tensorboard", "--accelerator", "cpu"]) == 0
    file = tmp_path / "run" / "metrics.json"
    metrics = json.loads(file.read_text())
    file.write_text(json.dumps(metrics | {images: "0" * len(metrics[images])}))
    assert main(["posthoc", "run", "--accelerator", "cpu"]) == 2
    assert "the run in run" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("posthoc-*"))


def test_an_unfinished_run_has_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny-ce", "--out", "run", "--no-tensorboard", "--accelerator", "cpu"]) == 0
    for file in (tmp_path / "run").glob("weights.*"):
        file.unlink()
    assert main(["posthoc", "run"]) == 2
    assert "did the run finish?" in capsys.readouterr().err
