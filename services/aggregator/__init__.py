"""The aggregator: folds trial batches as they arrive, each once, and publishes scores that sharpen meanwhile. It needs no torch."""
