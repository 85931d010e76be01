"""Accuracy and loss, whole and per class."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tests.support.jobs.blobs import BlobBatches, small_cnn
from worker.evaluation import NO_LOSS, Scores, evaluate, score
from worker.network import build_network
from worker.precision import Precision

CPU = Precision(torch.device("cpu"), None, channels_last=False)


def test_scores_count_right_answers_per_class() -> None:
    logits_NK = np.array([[2, 0, 0], [0, 3, 0], [1, 0, 0], [0, 0, 9]], dtype=np.float32)
    found = score(logits_NK, np.array([0, 1, 1, 2]))
    assert found.accuracy == 0.75
    assert found.correct == (1, 1, 1)
    assert found.examples == (1, 2, 1)
    wanted = [-math.log(math.exp(a) / sum(map(math.exp, row))) for a, row in ((2, (2, 0, 0)), (3, (0, 3, 0)))]
    wanted += [-math.log(1 / (math.e + 2)), -math.log(math.exp(9) / (math.exp(9) + 2))]
    assert found.loss == pytest.approx(sum(wanted) / 4)
    assert Scores.from_document(json.loads(json.dumps(found.document()))) == found


def test_a_class_without_examples_is_counted_as_none() -> None:
    found = score(np.zeros((2, 4), dtype=np.float32), np.array([0, 1]))
    assert found.examples == (1, 1, 0, 0)


def test_a_loss_that_is_no_number_has_a_stand_in() -> None:
    with np.errstate(all="ignore"):
        assert score(np.array([[np.nan, 0.0]], dtype=np.float32), np.array([1])).loss == NO_LOSS


def test_evaluation_does_not_depend_on_the_batches_and_leaves_the_network_as_it_was() -> None:
    network = build_network(small_cnn(dropout=0.5), seed=0).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    small = evaluate(network, BlobBatches(48, batch_size=4, shuffle=False).epoch(0), CPU)
    large = evaluate(network, BlobBatches(48, batch_size=48, shuffle=False).epoch(0), CPU)
    assert small.accuracy == large.accuracy
    assert small.loss == pytest.approx(large.loss, rel=1e-6)
    assert network.training
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image"):
        evaluate(build_network(small_cnn(), seed=0), [], CPU)
