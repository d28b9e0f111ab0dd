"""The aggregator: accumulates each committed trial batch once, and publishes scores, reports and the explorer. It needs no torch."""
