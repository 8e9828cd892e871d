"""The moving average against its recurrence, and that it goes on where it was."""

import copy

import pytest
import torch
from torch import nn

from ltkernels.trainer import TrainerError
from ltkernels.trainer.ema import ExponentialMovingAverage


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def train_step(model, seed):
    """Changes every parameter and the statistics of batch normalisation."""
    generator = torch.Generator().manual_seed(seed)
    model.train()(torch.randn(8, 4, generator=generator))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)


def test_recurrence_of_parameters_and_statistics():
    model = network()
    average = ExponentialMovingAverage(model, 0.6)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for t in range(1, 31):
        train_step(model, t)
        average.update(model)
        decay = min(0.6, t / (t + 9))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], atol=1e-5, rtol=1e-5)
    assert average.module[1].num_batches_tracked == 30


def test_early_averages_are_not_the_initial_weights():
    model = network()
    average = ExponentialMovingAverage(model, 0.9999)
    with torch.no_grad():
        model[0].weight.fill_(5.0)
    for _ in range(50):
        average.update(model)
    assert (average.module[0].weight > 4.9).all()


def test_no_decay_is_a_copy():
    model = network()
    average = ExponentialMovingAverage(model, 0.0)
    train_step(model, 1)
    average.update(model)
    for one, other in zip(average.module.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_network_in_training_is_left_alone():
    model = network()
    average = ExponentialMovingAverage(model, 0.9)
    assert not average.module.training and model.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    train_step(model, 1)
    before = copy.deepcopy(model.state_dict())
    average.update(model)
    average.module(torch.randn(3, 4))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_compiled_network_can_be_followed():
    model = network()
    average = ExponentialMovingAverage(model, 0.0)
    train_step(model, 1)
    average.update(torch.compile(model, backend="eager"))
    assert torch.equal(average.module[0].weight, model[0].weight)


def test_it_goes_on_where_it_was():
    model = network()
    average = ExponentialMovingAverage(model, 0.99)
    for t in range(4):
        train_step(model, t)
        average.update(model)
    saved, weights = copy.deepcopy(average.state_dict()), copy.deepcopy(model.state_dict())
    resumed_model = network(seed=1)
    resumed = ExponentialMovingAverage(resumed_model, 0.99)
    resumed_model.load_state_dict(weights)
    resumed.load_state_dict(saved)
    for one, other in ((model, average), (resumed_model, resumed)):
        train_step(one, 10)
        other.update(one)
    for name, value in average.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_named(decay):
    with pytest.raises(TrainerError, match="decay"):
        ExponentialMovingAverage(network(), decay)
