"""Trains TF-IDF and logistic regression on texts."""

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import memtail


def train(task: memtail.TrainingTask) -> memtail.Outcome:
    """Train on the texts of a subset, and evaluate on all."""
    data = task.dataset
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=task.options["C"], max_iter=200))
    model.fit(data.train_texts[task.subset], data.train_labels[task.subset])
    return memtail.Outcome(
        train_correct=model.predict(data.train_texts) == data.train_labels,
        test_correct=model.predict(data.test_texts) == data.test_labels,
        train_labels=data.train_labels,
    )
