"""The dispatcher: compares the declared trials with the committed ones in each pass, and queues the missing shards."""
