"""Draws comparison.png: memorization by the frozen against the trained backbone, and the images that each memorizes most."""

import sys

import matplotlib as mpl
import numpy as np

import memtail

mpl.use("agg")
from matplotlib import pyplot as plt

SHOWN = 6

store = sys.argv[1] if len(sys.argv) > 1 else "memtail-store"
mem = {name: memtail.load_scores(f"{store}/experiments/{name}").memorization["mem"] for name in ("frozen", "trained")}
data = np.load("images.npz")
images, labels = data["train_images"], data["train_labels"]

figure = plt.figure(figsize=(9.6, 3.8), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
axes = left.subplots()
groups = {
    "memorized by both": (mem["frozen"] >= 0.25) & (mem["trained"] >= 0.25),
    "memorized by one": (mem["frozen"] >= 0.25) ^ (mem["trained"] >= 0.25),
    "memorized by none": (mem["frozen"] < 0.25) & (mem["trained"] < 0.25),
}
for (name, chosen), shade in zip(groups.items(), ("#a34a10", "#1d6b5d", "#b9c7c3"), strict=True):
    axes.plot(mem["frozen"][chosen], mem["trained"][chosen], "o", markersize=4, color=shade, label=f"{name}: {chosen.sum()}")
axes.set_xlabel("memorization, frozen backbone")
axes.set_ylabel("memorization, trained backbone")
axes.set_ylim(top=1.25)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)

for part, (name, values) in zip(right.subfigures(2, 1), mem.items(), strict=True):
    part.suptitle(f"most memorized, {name} backbone", fontsize="medium")
    for axes, index in zip(part.subplots(1, SHOWN), np.argsort(-values), strict=False):
        axes.imshow(images[index], cmap="gray_r")
        axes.set_title(f"{labels[index]}: {values[index]:.2f}", fontsize="small")
        axes.set_axis_off()
figure.savefig("comparison.png", dpi=150)
memorized = ", ".join(f"{(values >= 0.25).sum()} by the {name} backbone" for name, values in mem.items())
print(f"memorized of {len(labels)} images: {memorized}, {groups['memorized by both'].sum()} by both")
