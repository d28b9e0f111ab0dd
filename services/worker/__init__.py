"""Workers: each trains shards on its devices, one warm process per device, and commits what they give to the bucket."""
