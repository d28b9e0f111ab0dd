"""The aggregator: accumulates each committed trial batch once, and publishes scores and reports. It needs no torch."""
