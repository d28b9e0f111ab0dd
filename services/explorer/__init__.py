"""The explorer: serves pages of all experiments of a bucket. It needs no torch and no Redis, and its key need not write."""
