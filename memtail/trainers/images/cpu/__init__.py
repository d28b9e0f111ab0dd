"""Compiled steps for processors: blocked matrix products, fully connected networks, max pooling with ReLU."""
