"""Trains a random forest of scikit-learn on the pixels of one trial's subset."""

from sklearn.ensemble import RandomForestClassifier

import memtail


def train(task: memtail.TrainingTask) -> memtail.Outcome:
    """Train the trial, and say which of all examples the forest classifies correctly."""
    data = task.dataset
    train, test = (images.reshape(len(images), -1) for images in (data.train_images, data.test_images))
    forest = RandomForestClassifier(**task.options, random_state=task.seed % 2**32)
    forest.fit(train[task.subset], data.train_labels[task.subset])
    return memtail.Outcome(
        train_correct=forest.predict(train) == data.train_labels,
        test_correct=forest.predict(test) == data.test_labels,
        train_labels=data.train_labels,
    )
