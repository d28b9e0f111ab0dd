"""The cut of an experiment's trials into shards: consecutive trials, at multiples of the recorded shard size."""

from memtail.trials import Shard


def missing_shards(trials: int, trials_per_shard: int, committed: list[Shard]) -> list[Shard]:
    """Return the shards without a batch: trials 0 to `trials` - 1 less the committed ones, cut at multiples of `trials_per_shard`.

    A grid cell that is committed in part, because the experiment was extended, is missing the rest. A committed shard that ends beyond
    the last trial does not count: its batch is not accumulated.
    """
    have = {trial for shard in committed if shard.last < trials for trial in shard.trials}
    missing: list[Shard] = []
    for trial in range(trials):
        if trial in have:
            continue
        if missing and missing[-1].last == trial - 1 and trial % trials_per_shard:
            missing[-1] = Shard(missing[-1].first, trial)
        else:
            missing.append(Shard(trial, trial))
    return missing
