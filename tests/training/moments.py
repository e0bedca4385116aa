"""Moments for tests: random ones, unusable ones, and whether two sets are the same bits."""

import math

import torch

from fedmomentum.aggregation.moments import Moments
from fedmomentum.training.optimizer_state import trained_parameters
from tests.helpers import generator


def same_moments(first, second):
    if first.keys() != second.keys():
        return False
    for name, one in first.items():
        other = second[name]
        if one.step != other.step or not torch.equal(one.first, other.first):
            return False
        if (one.second is None) != (other.second is None):
            return False
        if one.second is not None and not torch.equal(one.second, other.second):
            return False
    return True


def copy_of(moments):
    return {
        name: Moments(m.first.clone(), None if m.second is None else m.second.clone(), m.step)
        for name, m in moments.items()
    }


def random_moments(model, step=5, seed=0, is_sgd=False):
    g = generator(seed)
    result = {}
    for name, parameter in trained_parameters(model).items():
        first = torch.randn(parameter.shape, generator=g)
        second = None if is_sgd else torch.rand(parameter.shape, generator=g)
        result[name] = Moments(first, second, step)
    return result


def bad_moments():
    good = torch.ones(4, 32)
    nan = good.clone()
    nan[1, 2] = math.nan
    negative = good.clone()
    negative[0, 0] = -1e-9
    return [
        (
            Moments(torch.ones(32, 4), good, 1),
            r"first moment of .*lora_A.*\(32, 4\); wanted \(4, 32\)",
        ),
        (
            Moments(good, torch.ones(128), 1),
            r"second moment of .*lora_A.*\(128,\); wanted \(4, 32\)",
        ),
        (Moments(nan, good, 1), "first moment of .*lora_A.* is not finite"),
        (Moments(good, good / 0, 1), "second moment of .*lora_A.* is not finite"),
        (Moments(good, negative, 1), "second moment of .*lora_A.* has a number below 0"),
        (Moments(good.int(), good, 1), "first moment of .*lora_A.* dtype torch.int32"),
        (Moments([1.0], good, 1), "first moment of .*lora_A.*: got list; wanted a tensor"),
        (Moments(good, good, 0), "moments of .*lora_A.*: step = 0; wanted .* at least 1"),
        (Moments(good, good, 1.5), "moments of .*lora_A.*: step = 1.5"),
        (good, "moments of .*lora_A.*: got Tensor; wanted Moments"),
    ]
