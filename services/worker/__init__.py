"""Workers: train shards in one long-lived process per device, and commit the trial batches to the bucket."""
