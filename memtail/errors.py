"""What can go wrong through no fault of memtail: each error's text is one line that names the thing, the value and the mend.

The command line prints that line and exits with 2; a library user catches `MemtailError`.
"""


class MemtailError(Exception):
    """Base of every error that a user can mend."""


class SpecError(MemtailError):
    """The experiment file says something that cannot be run."""


class DatasetError(MemtailError):
    """A dataset is missing, corrupt or not what it should be."""


class StoreError(MemtailError):
    """The object store cannot be used, or holds something other than what was asked for."""


class ForeignObjectError(StoreError):
    """An object is not what its key says: damaged, too large, or of another experiment."""


class ScoresError(MemtailError):
    """Published scores are missing or do not answer what was asked."""
