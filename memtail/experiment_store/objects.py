"""`ExperimentObjects`: a store and the name of an experiment, the base of the classes that read and write its objects."""

from memtail.storage import ObjectStore

#: Tries to change an object that others change at the same time.
MOST_TRIES = 100
#: Limit in bytes of controls, notices and other small objects.
SMALL = 1 << 20


class ExperimentObjects:
    """The objects of one experiment in a store.

    Args:
        store: the object store.
        name: name of the experiment.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.store = store
        self.name = name
