"""The measures of ELM against loops over images and classes; its pictures as far as numbers can say."""

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.metrics import Outputs  # noqa: E402
from ltkernels.trainer.papers import elm_plots  # noqa: E402
from ltkernels.trainer.papers.elm_measures import ElmMeasures, measure  # noqa: E402

COUNTS = (120, 101, 60, 20, 9, 3, 1)
CLASSES, WIDTH, PER_CLASS = len(COUNTS), 5, 4


def outputs(counts, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    target = target[torch.randperm(len(target), generator=generator)]
    centre = torch.randn(len(counts), WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    embedding = 2 * centre[target] + torch.randn(len(target), WIDTH, generator=generator, dtype=torch.float64)
    logits = torch.randn(len(target), len(counts), generator=generator, dtype=torch.float64)
    logits[torch.arange(len(target)), target] += 1
    return Outputs(embedding.to(dtype), logits.to(dtype), target)


def train_and_test(dtype=torch.float64):
    return outputs(COUNTS, 0, dtype), outputs((PER_CLASS,) * CLASSES, 1, dtype)


def of_class(part, outputs, label):
    return [row for row, y in zip(getattr(outputs, part).tolist(), outputs.target.tolist(), strict=True) if y == label]


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def unit(row):
    length = math.hypot(*row)
    return [x / length for x in row]


def spread(train, test, label, change):
    """Of test images around the mean of training images, each changed first."""
    centre = mean([change(row) for row in of_class("embedding", train, label)])
    rows = [change(row) for row in of_class("embedding", test, label)]
    return sum(distance(row, centre) for row in rows) / (len(rows) - 1)


def scores(outputs, label, scale):
    """Mean error in percent, cross-entropy and margin of the images of a class."""
    found = []
    for row in of_class("logits", outputs, label):
        row = [scale * x for x in row]
        others = max(x for c, x in enumerate(row) if c != label)
        loss = math.log(sum(math.exp(x) for x in row)) - row[label]
        found.append([100.0 * (others > row[label]), loss, row[label] - others])
    return mean(found)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_measures_against_loops(scale):
    train, test = train_and_test()
    found = measure(train, test, scale)
    assert found.class_counts.tolist() == list(COUNTS)
    centres = [mean([unit(row) for row in of_class("embedding", train, c)]) for c in range(CLASSES)]
    for c in range(CLASSES):
        expected = spread(train, test, c, unit)
        nearest = min(distance(centres[c], centres[other]) for other in range(CLASSES) if other != c)
        assert found.spread[c].item() == pytest.approx(expected)
        assert found.relative_spread[c].item() == pytest.approx(expected / nearest)
        assert found.raw_spread[c].item() == pytest.approx(spread(train, test, c, list))
        lengths = [math.hypot(*row) for row in of_class("embedding", test, c)]
        assert found.norm[c].item() == pytest.approx(sum(lengths) / len(lengths))
        on_train, on_test = scores(train, c, scale), scores(test, c, scale)
        assert found.error_gap[c].item() == pytest.approx(on_test[0] - on_train[0])
        assert found.loss_gap[c].item() == pytest.approx(on_test[1] - on_train[1])
        assert found.margin_gap[c].item() == pytest.approx(on_train[2] - on_test[2])


def test_group_means():
    found = measure(*train_and_test())
    groups = found.group_means()
    members = {"all": range(7), "many": (0, 1), "medium": (2, 3), "few": (4, 5, 6)}
    members["smallest third"] = (4, 5, 6)
    for group, labels in members.items():
        assert set(groups[group]) == set(ElmMeasures.names())
        for name, value in groups[group].items():
            assert value == pytest.approx(sum(getattr(found, name)[c].item() for c in labels) / len(labels))


def test_a_group_without_classes_has_no_mean():
    train, test = outputs((50, 40), 0), outputs((3, 3), 1)
    groups = measure(train, test).group_means()
    assert groups["many"]["spread"] is None and groups["few"]["loss_gap"] is None
    assert groups["medium"] == groups["all"]


def test_smallest_third_goes_by_the_counts_not_by_the_labels():
    counts = (3, 70, 5, 60, 4, 50, 80, 6, 90, 40)
    found = measure(outputs(counts, 0), outputs((3,) * 10, 1))
    third = found.group_means()["smallest third"]
    assert third["spread"] == pytest.approx(sum(found.spread[c].item() for c in (0, 2, 4, 7)) / 4)


def test_lengths_change_raw_spread_only():
    train, test = train_and_test()
    shorter = [outputs._replace(embedding=outputs.embedding / 10) for outputs in (train, test)]
    whole, short = measure(train, test), measure(*shorter)
    torch.testing.assert_close(short.spread, whole.spread)
    torch.testing.assert_close(short.relative_spread, whole.relative_spread)
    torch.testing.assert_close(short.raw_spread, whole.raw_spread / 100)
    torch.testing.assert_close(short.norm, whole.norm / 10)


def test_a_network_that_generalises_has_no_gaps():
    _, test = train_and_test()
    found = measure(test, test)
    for name in ("error_gap", "loss_gap", "margin_gap"):
        assert not getattr(found, name).any()
    # Around the images' own mean, n / (n - 1) gives the unbiased variance, summed over the dimensions.
    z = torch.nn.functional.normalize(test.embedding, dim=1)
    variance = torch.stack([z[test.target == c].var(0).sum() for c in range(CLASSES)])
    torch.testing.assert_close(found.spread, variance)


def test_16_bit_outputs_and_integer_types():
    train, test = train_and_test()
    found = measure(*(Outputs(x.embedding.bfloat16(), x.logits.bfloat16(), x.target.int()) for x in (train, test)))
    exact = measure(train, test)
    for name in ("spread", "relative_spread", "raw_spread", "norm", "loss_gap"):
        assert getattr(found, name).dtype == torch.float64
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=0.02, atol=0.02)


def test_json_keeps_every_bit():
    found = measure(*train_and_test())
    text = found.to_json()
    assert json.loads(text)["group_means"]["few"]["spread"] == found.group_means()["few"]["spread"]
    again = ElmMeasures.from_json(text)
    for name in ("class_counts", *ElmMeasures.names()):
        assert torch.equal(getattr(again, name), getattr(found, name))
        assert getattr(again, name).dtype == getattr(found, name).dtype


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"class_counts": [1]}', "null"])
def test_other_json_is_refused(text):
    with pytest.raises(TrainerError, match="to_json"):
        ElmMeasures.from_json(text)


def wrong(train, test):
    """What is wrong with which outputs, and what the message names."""
    few_test = test.target != 3
    few_test[(test.target == 3).nonzero()[0]] = True
    nan = train.embedding.clone()
    nan[3, 2] = torch.nan
    same = torch.ones_like(train.embedding)
    return {
        "train: expected shapes": (train._replace(embedding=train.embedding[:-1]), test),
        "test: expected shapes": (train, test._replace(logits=test.logits[:, :-1])),
        "from 0 to 6": (train, test._replace(target=test.target + 1)),
        "train: embedding holds": (train._replace(embedding=nan), test),
        "test: logits holds": (train, test._replace(logits=test.logits / 0)),
        "train: expected at least 1 images of a class, got 0 of 2": (
            Outputs(*(x[train.target != 2] for x in train)),
            test,
        ),
        "test: expected at least 2 images of a class, got 1 of 3": (train, Outputs(*(x[few_test] for x in test))),
        r"classes \d and \d coincide": (train._replace(embedding=same), test),
        "two classes": (
            Outputs(train.embedding, train.logits[:, :1], torch.zeros_like(train.target)),
            Outputs(test.embedding, test.logits[:, :1], torch.zeros_like(test.target)),
        ),
    }


@pytest.mark.parametrize("message", list(wrong(*train_and_test())))
def test_wrong_outputs_are_named(message):
    with pytest.raises(TrainerError, match=message):
        measure(*wrong(*train_and_test())[message])


# Pictures


@pytest.fixture
def figures(monkeypatch):
    """The pictures as figures, whose lines can be read."""
    monkeypatch.setattr(elm_plots, "_png", lambda figure: figure)


def uniform(counts, value, relative):
    """Measures with the same spread for every class."""
    values = {name: torch.zeros(len(counts), dtype=torch.float64) for name in ElmMeasures.names()}
    values |= dict(spread=values["spread"] + value, relative_spread=values["spread"] + relative)
    return ElmMeasures(class_counts=torch.tensor(counts), **values)


def many_outputs(seed=0):
    """Sixteen images of ten classes each."""
    return outputs((16,) * 10, seed)


TEN = (300, 150, 90, 90, 60, 30, 15, 9, 9, 2)


@pytest.mark.parametrize("counts", [COUNTS, tuple(range(100, 0, -1)), (5,) * 30])
def test_spread_pictures(figures, counts):
    seeds = [uniform(counts, 0.2, 1.0), uniform(counts, 0.4, 2.0)]
    figure = elm_plots.spread_picture({"CE": seeds, "ELM": [uniform(counts, 0.1, 0.5)]})
    for axes, values in zip(figure.axes, ((0.3, 0.1), (1.5, 0.5)), strict=True):
        drawn = [line for line in axes.lines if line.get_marker() in ("o", "s")]  # no borders, no ends of error bars
        assert {round(y, 9) for line in drawn for y in line.get_ydata()} == set(values)
        assert axes.get_xlim()[0] > max(counts) >= min(counts) > axes.get_xlim()[1]  # large classes on the left
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["CE", "ELM"]


def test_spread_pictures_have_the_standard_error_over_seeds(figures):
    figure = elm_plots.spread_picture({"CE": [uniform(COUNTS, 0.2, 1.0), uniform(COUNTS, 0.4, 2.0)]})
    bars = figure.axes[0].containers[0].lines[2][0].get_segments()
    for segment in bars:  # two values: the standard error is half their distance
        assert segment[:, 1].tolist() == pytest.approx([0.2, 0.4])


def test_what_spread_pictures_refuse():
    for measures in ({}, {"CE": []}):
        with pytest.raises(TrainerError, match="one method or more"):
            elm_plots.spread_picture(measures)
    with pytest.raises(TrainerError, match="same class counts"):
        elm_plots.spread_picture({"CE": [uniform((9, 5), 1, 1)], "ELM": [uniform((9, 4), 1, 1)]})


def test_head_and_tail():
    assert elm_plots.head_and_tail(TEN) == ([0, 1, 2], [7, 8, 9])
    assert elm_plots.head_and_tail((1, 9, 9, 2, 9, 9, 2)) == ([1, 2, 4], [3, 6, 0])
    with pytest.raises(TrainerError, match="6 classes"):
        elm_plots.head_and_tail((3, 2, 1))


def test_projections_are_principal_components(figures):
    test = many_outputs()
    figure = elm_plots.projection_picture({"CE": test, "ELM": many_outputs(1)}, TEN, [f"name {c}" for c in range(10)])
    shown = torch.isin(test.target, torch.tensor([0, 1, 2, 7, 8, 9]))
    z = torch.nn.functional.normalize(test.embedding[shown], dim=1)
    z = z - z.mean(0)
    values, vectors = torch.linalg.eigh(z.T @ z)
    points = torch.tensor(np.concatenate([np.stack(line.get_data(), 1) for line in figure.axes[0].lines[:6]]))
    # As sets: rows are drawn class by class, and the sign of a component is free.
    expected = (z @ vectors[:, -2:].flip(1)).abs()
    torch.testing.assert_close(points.abs().sort(0).values, expected.sort(0).values)
    share = values[-2:].sum() / values.sum()
    assert figure.axes[0].get_title() == f"CE\n{share:.0%} of the variance"
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim() == figure.axes[1].get_ylim()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:3] == ["head: name 0 (300)", "tail: name 7 (9)", "head: name 1 (150)"]


def test_what_projections_refuse():
    test = many_outputs()
    with pytest.raises(TrainerError, match="one method or more"):
        elm_plots.projection_picture({}, TEN)
    with pytest.raises(TrainerError, match="10 names"):
        elm_plots.projection_picture({"CE": test}, TEN, ["a"])
    without = Outputs(*(x[test.target != 8] for x in test))
    with pytest.raises(TrainerError, match="CE: expected test images of class 8"):
        elm_plots.projection_picture({"CE": without}, TEN)


def test_pictures_are_png_files():
    for png in (
        elm_plots.spread_picture({"CE": [uniform(COUNTS, 0.2, 1.0)]}),
        elm_plots.projection_picture({"CE": many_outputs()}, TEN, ["$^$"] * 10),
    ):
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
