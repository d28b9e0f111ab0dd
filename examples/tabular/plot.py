"""Draws agreement.png: memorization of each patient by the trees against memorization by the networks."""

import sys

import matplotlib as mpl
import numpy as np

import memtail

mpl.use("agg")
from matplotlib import pyplot as plt

store = sys.argv[1] if len(sys.argv) > 1 else "memtail-store"
boosted, mlp = (memtail.load_scores(f"{store}/experiments/{name}").memorization["mem"] for name in ("boosted", "mlp"))
both = [(boosted >= 0.25) & (mlp >= 0.25), (boosted >= 0.25) ^ (mlp >= 0.25), (boosted < 0.25) & (mlp < 0.25)]
names = ("memorized by both", "memorized by one", "memorized by none")
figure, axes = plt.subplots(figsize=(5.4, 4.2), layout="constrained")
for chosen, name, shade in zip(both, names, ("#a34a10", "#1d6b5d", "#b9c7c3"), strict=True):
    axes.plot(boosted[chosen], mlp[chosen], "o", markersize=4, color=shade, label=f"{name}: {chosen.sum()}")
axes.set_xlabel("memorization by gradient-boosted trees")
axes.set_ylabel("memorization by the built-in network")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
figure.savefig("agreement.png", dpi=150)
print(f"correlation {np.corrcoef(boosted, mlp)[0, 1]:.2f}")
