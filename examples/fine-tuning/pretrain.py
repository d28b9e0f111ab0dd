"""Trains the network on scikit-learn's digits 0 to 5, and sets the digits 6 to 9 aside for fine-tuning.

Writes backbone.pt, the weights, and images.npz, a small dataset of classes that the weights have never seen.
"""

import numpy as np
import torch
from network import build
from sklearn.datasets import load_digits
from torch.nn import functional as F

TRAIN, TEST, EPOCHS = 400, 300, 30

digits = load_digits()
images, labels = np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target

train, test = np.split(np.random.default_rng(0).permutation(np.flatnonzero(labels > 5))[: TRAIN + TEST], [TRAIN])
names = labels.astype(str)
np.savez("images.npz", train_images=images[train], train_labels=names[train], test_images=images[test], test_labels=names[test])

torch.set_num_threads(1)  # with other numbers of threads sums are rounded differently
torch.manual_seed(0)
inputs, targets = torch.from_numpy(images[labels <= 5])[:, None] / 255, torch.from_numpy(labels[labels <= 5])
inputs = (inputs - inputs.mean()) / inputs.std()
network = build(tuple(inputs.shape[1:]), 6)
optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
for _ in range(EPOCHS):
    for batch in torch.randperm(len(inputs)).split(64):
        loss = F.cross_entropy(network(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
torch.save(network.state_dict(), "backbone.pt")
print(f"pretrained on {len(inputs)} images of 0 to 5, to a loss of {loss.item():.4f}; {TRAIN} images of 6 to 9 are for fine-tuning")
