"""Trains gradient-boosted trees."""

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

import memtail


def train(task: memtail.TrainingTask) -> memtail.Outcome:
    """Train on the rows of a subset, and evaluate on all."""
    data = task.dataset
    model = HistGradientBoostingClassifier(max_iter=60, random_state=task.seed % 2**32)
    model.fit(data.train_features[task.subset], data.train_labels[task.subset])
    train_p, test_p = (model.predict_proba(features) for features in (data.train_features, data.test_features))
    return memtail.Outcome(
        train_correct=train_p.argmax(1) == data.train_labels,
        test_correct=test_p.argmax(1) == data.test_labels,
        train_score=np.take_along_axis(train_p, data.train_labels[:, None], 1)[:, 0],
        test_score=np.take_along_axis(test_p, data.test_labels[:, None], 1)[:, 0],
        train_labels=data.train_labels,
    )
