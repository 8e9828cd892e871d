"""The embedding losses of ELM against their formulas, written out in Python loops in float64."""

import math

import pytest
import torch

from ltkernels.margins import DeferredReweighting
from ltkernels.nn import LDAMLoss, LogitAdjustedLoss
from ltkernels.trainer import TrainerError
from ltkernels.trainer.papers.elm import ELMLoss, EmbeddingMarginLoss

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = (300, 40, 40, 7, 2)
WIDTH = 6
FORMS = ("A", "B", "C", "D")
# Class 0 has four rows, 1 two, 3 one; 2 and 4 have only their prototype.
TARGET = (0, 1, 0, 3, 0, 1, 0)
# Priors and class weights are kept in float32.
CLOSE = dict(rtol=1e-6, atol=1e-7)


def brute_force(form, embedding, target, prototypes, counts, temperature, tau_e, g):
    """The loss as a float, from lists: a loop over rows, their positives, the classes and the keys of each."""
    anchors = [unit(row) for row in embedding.tolist()]
    keys = anchors + [unit(row) for row in prototypes.tolist()]
    label = target.tolist() + list(range(len(counts)))
    classes = range(len(counts))
    weights = [(max(counts) / counts[y]) ** g for y in target.tolist()]
    weights = [weight * len(weights) / sum(weights) for weight in weights]  # mean 1 over the batch
    if form == "D":
        return attraction(anchors, target.tolist(), keys[len(anchors) :], [(max(counts) / n) ** g for n in counts])
    losses = []
    for i, anchor in enumerate(anchors):
        y = label[i]
        s = [sum(a * b for a, b in zip(anchor, key, strict=True)) / temperature for key in keys]
        members = {c: [a for a in range(len(keys)) if label[a] == c] for c in classes}
        positives = [a for a in members[y] if a != i]
        prior = [count / sum(counts) for count in counts]
        if form == "A":
            terms = []
            for p in positives:
                inner = 1.0
                for c in classes:
                    if c != y:
                        factor = (prior[c] / prior[y]) ** tau_e
                        inner += factor * sum(math.exp(s[a] - s[p]) for a in members[c]) / len(members[c])
                terms.append(math.log(inner))
            losses.append(sum(terms) / len(terms))
        elif form == "B":
            everything = sum(math.exp(s[a]) / len(members[label[a]]) for a in range(len(keys)) if a != i)
            losses.append(math.log(everything) - sum(s[p] for p in positives) / len(positives))
        else:
            logits = []
            for c in classes:
                others = [a for a in members[c] if a != i]
                pooled = math.log(sum(math.exp(s[a]) for a in others) / len(others))
                logits.append(pooled + tau_e * math.log(prior[c]))
            losses.append(math.log(sum(math.exp(o) for o in logits)) - logits[y])
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / len(losses)


def attraction(anchors, target, prototypes, class_weights):
    means, weights = [], []
    for c in sorted(set(target)):
        of_class = [anchor for anchor, y in zip(anchors, target, strict=True) if y == c]
        distances = [sum((a - b) ** 2 for a, b in zip(row, prototypes[c], strict=True)) for row in of_class]
        means.append(sum(distances) / len(distances))
        weights.append(class_weights[c])
    return sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)


def unit(row):
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


def embeddings(rows, seed=0, dtype=torch.float64):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(form, counts=COUNTS, dtype=torch.float64, **options):
    torch.manual_seed(3)
    return EmbeddingMarginLoss(counts, WIDTH, form, **options).to(dtype)


def check(form, target, counts=COUNTS, seed=0, **options):
    target = torch.tensor(target)
    embedding = embeddings(len(target), seed)
    loss = loss_of(form, counts, **options)
    settings = dict(temperature=loss.temperature, tau_e=loss.tau_e, g=loss.g)
    expected = brute_force(form, embedding, target, loss.prototypes, counts, **settings)
    found = loss(embedding, target)
    assert found.dtype == torch.float64 and found.shape == ()
    assert found.item() == pytest.approx(expected, rel=CLOSE["rtol"], abs=CLOSE["atol"])


@pytest.mark.parametrize("g", [0.0, 0.25])
@pytest.mark.parametrize(
    ("form", "tau_e"), [*((form, tau) for form in "AC" for tau in (0.0, 0.5, 1.0)), ("B", 0.0), ("D", 0.0)]
)
def test_forms_against_their_formulas(form, tau_e, g):
    check(form, TARGET, tau_e=tau_e, g=g)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 2.0])
def test_temperatures(form, temperature):
    check(form, TARGET, temperature=temperature, g=0.25)


BATCHES = {
    "one class": (2, 2, 2, 2),
    "one row": (4,),
    "every row another class": (4, 2, 0, 1, 3),
    "one class with a single row": (0, 0, 0, 4),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(form, batch):
    tau_e = 1.0 if form in "AC" else 0.0
    check(form, BATCHES[batch], tau_e=tau_e, g=0.25)


@pytest.mark.parametrize("form", FORMS)
def test_random_batches(form):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(len(COUNTS), (24,), generator=generator).tolist()
        check(form, target, seed=seed, g=0.25)


@pytest.mark.parametrize("form", FORMS)
def test_a_single_class_in_the_data(form):
    """Nothing to tell apart: A and C are 0, with zero gradients; B and D still attract."""
    loss, embedding = loss_of(form, counts=(12,)), embeddings(3).requires_grad_()
    target = torch.zeros(3, dtype=torch.int64)
    value = loss(embedding, target)
    value.backward()
    assert embedding.grad.isfinite().all() and loss.prototypes.grad.isfinite().all()
    if form in "AC":
        assert value == 0 and not embedding.grad.any() and not loss.prototypes.grad.any()
    else:
        assert embedding.grad.any() and loss.prototypes.grad.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", [TARGET, BATCHES["one class"], BATCHES["every row another class"]])
def test_gradients(form, target):
    loss = loss_of(form, temperature=0.3, tau_e=0.5 if form in "AC" else 0.0, g=0.25)
    embedding = embeddings(len(target)).requires_grad_()
    target = torch.tensor(target)

    def of_both(embedding, prototypes):
        return torch.func.functional_call(loss, {"prototypes": prototypes}, (embedding, target))

    assert torch.autograd.gradcheck(of_both, (embedding, loss.prototypes))


@pytest.mark.parametrize("form", FORMS)
def test_prototypes_that_learn(form):
    """Those of the batch's classes always; under A, B and C also those of classes that are absent, as negatives."""
    loss = loss_of(form)
    loss(embeddings(len(TARGET)), torch.tensor(TARGET)).backward()
    learning = loss.prototypes.grad.abs().sum(1) > 0
    assert learning.tolist() == ([c in TARGET for c in range(5)] if form == "D" else [True] * 5)


@pytest.mark.parametrize("form", FORMS)
def test_the_length_of_embeddings_does_not_matter(form):
    loss, embedding, target = loss_of(form), embeddings(len(TARGET)), torch.tensor(TARGET)
    length = torch.linspace(0.1, 30, len(TARGET), dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss(embedding * length, target), loss(embedding, target))


@pytest.mark.parametrize("form", FORMS)
def test_an_embedding_of_zeros(form):
    """What a dead layer gives: no direction, no gradient, and nothing that is not finite."""
    loss, embedding = loss_of(form, dtype=torch.float32), embeddings(len(TARGET), dtype=torch.float32)
    embedding[2] = 0
    embedding.requires_grad_()
    loss(embedding, torch.tensor(TARGET)).backward()
    assert embedding.grad.isfinite().all() and not embedding.grad[2].any() and embedding.grad[0].any()
    assert loss.prototypes.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.02, 0.1])
def test_lower_precision(form, dtype, temperature):
    """The inputs are rounded, the arithmetic on them is float32."""
    target = torch.tensor(TARGET)
    embedding = embeddings(len(TARGET), dtype=dtype).requires_grad_()
    loss = loss_of(form, dtype=torch.float32, temperature=temperature, g=0.25)
    exact = loss_of(form, dtype=torch.float32, temperature=temperature, g=0.25).double()
    wide = embedding.detach().double().requires_grad_()
    expected, found = exact(wide, target), loss(embedding, target)
    assert found.dtype == torch.float32
    found.backward()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert embedding.grad.dtype == dtype
    rounding = torch.finfo(dtype).eps
    largest = wide.grad.abs().max().item()
    torch.testing.assert_close(embedding.grad.double(), wide.grad, rtol=rounding, atol=2e-5 * largest)
    torch.testing.assert_close(loss.prototypes.grad.double(), exact.prototypes.grad, rtol=1e-4, atol=2e-5 * largest)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_nothing(form):
    loss, embedding, target = (
        loss_of(form, dtype=torch.float32),
        embeddings(7, dtype=torch.float32),
        torch.tensor(TARGET),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(embedding, target)
    torch.testing.assert_close(found, loss(embedding, target), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_the_rows_does_not_matter(form):
    loss, embedding, target = loss_of(form, g=0.25), embeddings(7), torch.tensor(TARGET)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(embedding[order], target[order].int()), loss(embedding, target))


def test_a_prior_makes_room_for_rare_classes():
    """At tau_e = 1 the row of a rare class is pushed harder from a frequent one, and the other way round less."""
    frequent, rare = torch.tensor([0]), torch.tensor([4])
    for form in "AC":
        plain, prior = loss_of(form), loss_of(form, tau_e=1.0)
        assert prior(embeddings(1), rare) > plain(embeddings(1), rare)
        assert prior(embeddings(1), frequent) < plain(embeddings(1), frequent)


def test_form_d_is_a_distance():
    loss = loss_of("D")
    target = torch.tensor([1, 3, 3])
    assert loss(loss.prototypes[target] * 5, target).item() == pytest.approx(0, abs=1e-12)
    assert loss(-loss.prototypes[target], target).item() == pytest.approx(4)


def logits_and_more():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(len(TARGET), len(COUNTS), generator=generator), embeddings(7, dtype=torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_the_total(form):
    logits, embedding = logits_and_more()
    target = torch.tensor(TARGET)
    logit_loss, embedding_loss = LogitAdjustedLoss(COUNTS), loss_of(form, dtype=torch.float32)
    total = ELMLoss(logit_loss, embedding_loss, 0.3)(logits, embedding, target)
    torch.testing.assert_close(total, logit_loss(logits, target) + 0.3 * embedding_loss(embedding, target))


def test_weight_zero_is_the_logit_loss_exactly():
    logits, embedding = logits_and_more()
    target = torch.tensor(TARGET)
    alone, together = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    embedding.requires_grad_()
    criterion = ELMLoss(LogitAdjustedLoss(COUNTS), loss_of("A", dtype=torch.float32), 0.0)
    expected, found = LogitAdjustedLoss(COUNTS)(alone, target), criterion(together, embedding, target)
    expected.backward()
    found.backward()
    assert torch.equal(found, expected) and torch.equal(together.grad, alone.grad)
    assert embedding.grad is None and criterion.embedding_loss.prototypes.grad is None


def test_epochs_reach_the_logit_loss():
    logits, embedding = logits_and_more()
    schedule = DeferredReweighting(COUNTS, start_epoch=2)
    criterion = ELMLoss(LDAMLoss(COUNTS, weight=schedule), loss_of("A", dtype=torch.float32), 0.1)
    values = []
    for epoch in (0, 1, 2):
        criterion.set_epoch(epoch)
        values.append(criterion(logits, embedding, torch.tensor(TARGET)).item())
    assert values[0] == values[1] != values[2]


def test_what_is_saved_and_learned():
    criterion = ELMLoss(LogitAdjustedLoss(COUNTS), loss_of("A", tau_e=0.5, dtype=torch.float32), 0.1)
    assert [name for name, _ in criterion.named_parameters()] == ["embedding_loss.prototypes"]
    other = ELMLoss(LogitAdjustedLoss(COUNTS), EmbeddingMarginLoss(COUNTS, WIDTH, tau_e=0.5), 0.1)
    other.load_state_dict(criterion.state_dict())
    logits, embedding = logits_and_more()
    assert torch.equal(
        other(logits, embedding, torch.tensor(TARGET)), criterion(logits, embedding, torch.tensor(TARGET))
    )
    torch.testing.assert_close(
        criterion.embedding_loss.prototypes.norm(dim=1), torch.ones(5), msg="prototypes start as directions"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(form="E"), "form"),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=math.inf), "temperature"),
        (dict(tau_e=-0.5), "tau_e"),
        (dict(tau_e=math.nan), "tau_e"),
        (dict(g=-1.0), "g: "),
        (dict(form="B", tau_e=0.5), "form B has no prior"),
        (dict(form="D", tau_e=1.0), "form D has no prior"),
        (dict(embedding_dim=0), "embedding_dim"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(TrainerError, match=message):
        EmbeddingMarginLoss(COUNTS, **{"embedding_dim": WIDTH, **options})


@pytest.mark.parametrize(
    ("embedding", "target", "message"),
    [
        (torch.zeros(3, WIDTH + 1), torch.zeros(3, dtype=torch.int64), "embedding"),
        (torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64), "embedding"),
        (torch.zeros(3, 2, WIDTH), torch.zeros(3, dtype=torch.int64), "embedding"),
        (torch.zeros(4, WIDTH), torch.zeros(2, dtype=torch.int64), "target"),
        (torch.zeros(2, WIDTH), torch.zeros(2), "target"),
        (torch.zeros(2, WIDTH), torch.tensor([0, 5]), "from 0 to 4, got 0 to 5"),
        (torch.zeros(2, WIDTH), torch.tensor([-1, 1]), "from 0 to 4, got -1 to 1"),
    ],
)
def test_bad_batches_are_named(embedding, target, message):
    with pytest.raises(TrainerError, match=message):
        EmbeddingMarginLoss(COUNTS, WIDTH)(embedding, target)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_bad_weight_is_named(weight):
    with pytest.raises(TrainerError, match="weight"):
        ELMLoss(LogitAdjustedLoss(COUNTS), EmbeddingMarginLoss(COUNTS, WIDTH), weight)
