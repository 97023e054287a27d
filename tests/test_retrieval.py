import itertools

import numpy as np
import pytest

from brgsa_jax.config import UserError
from brgsa_jax.evals.retrieval import chance_recall_at_k, recall_at_k


def test_recall_counts_the_best_relevant_item():
    scores = np.array([[0.9, 0.5, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])
    relevant = np.eye(3, dtype=bool)
    assert recall_at_k(scores, relevant, (1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 1, 3: 1})
    assert recall_at_k(scores, ~relevant, (1,)) == pytest.approx({1: 2 / 3})


def test_chance_is_the_mean_over_all_orders():
    relevant = np.array([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]], bool)
    orders = [np.array(order, float) for order in itertools.permutations(range(5))]
    for k, value in chance_recall_at_k(relevant, (1, 2, 4, 5, 9)).items():
        mean = np.mean([recall_at_k(np.stack([o, o]), relevant, (k,))[k] for o in orders])
        np.testing.assert_allclose(value, mean, rtol=1e-12)


def test_equal_scores_give_chance():
    relevant = np.array([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]], bool)
    constant = recall_at_k(np.zeros((2, 5)), relevant, (1, 2, 4))
    assert constant == pytest.approx(chance_recall_at_k(relevant, (1, 2, 4)))
    # One item above, the relevant one tied with two others: a third of the orders.
    assert recall_at_k(np.array([[3.0, 1, 1, 1, 0]]), np.array([[0, 1, 0, 0, 0]], bool), (2,)) \
        == {2: pytest.approx(1 / 3)}


@pytest.mark.parametrize(("scores", "relevant", "message"), [
    (np.zeros((2, 3)), np.ones((2, 2), bool), "differ"),
    (np.full((1, 2), np.nan), np.ones((1, 2), bool), "not finite"),
    (np.zeros((1, 2)), np.zeros((1, 2), bool), "no relevant item"),
])
def test_what_cannot_be_ranked_is_refused(scores, relevant, message):
    with pytest.raises(UserError, match=message):
        recall_at_k(scores, relevant)
