"""One experiment's objects in a store: its record, control, failures, notices and trial batches."""
