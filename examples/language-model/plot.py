"""Draws memorization.png: memorization of the canaries by the number of times that they are written, and of reports."""

import re
import sys

import matplotlib as mpl
import numpy as np

import memtail

mpl.use("agg")
from matplotlib import pyplot as plt

store = sys.argv[1] if len(sys.argv) > 1 else "memtail-store"
table = memtail.load_scores(f"{store}/experiments/language-model").memorization
written = [re.search(r"written (\d+) times", name) for name in table["filename"]]
times = np.array([int(found[1]) if found else 0 for found in written])
groups = [*(int(number) for number in np.unique(times) if number), 0]
rng = np.random.default_rng(0)
figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
for place, group in enumerate(groups):
    values = table["mem_p"][times == group]
    axes.plot(place + rng.uniform(-0.18, 0.18, len(values)), values, "o", markersize=4, alpha=0.5, color="#1d6b5d")
    axes.plot([place - 0.3, place + 0.3], [values.mean()] * 2, color="#a34a10", linewidth=2)
axes.set_xticks(range(len(groups)), [f"written {group} time{'s' if group > 1 else ''}" if group else "reports" for group in groups])
axes.set_ylabel("memorization of scores, mem_p")
axes.spines[["top", "right"]].set_visible(False)
figure.savefig("memorization.png", dpi=150)
