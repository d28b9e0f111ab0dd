"""Writes documents.csv: short reports from templates, and canaries: reports with a random code, some of them repeated."""

import csv
from pathlib import Path

import numpy as np

PEOPLE = ("anna", "boris", "chloe", "diego", "erik", "fatima", "grace", "hugo")
PLACES = ("oslo", "cairo", "lima", "kyoto", "dakar", "quito", "turin", "perth")
THINGS = ("apples", "bricks", "candles", "drums", "engines", "feathers", "guitars", "hammers")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday")
# Number of canaries that are written so many times.
CANARIES = {1: 16, 2: 8, 4: 4, 8: 2}

rng = np.random.default_rng(0)


def report() -> str:
    """A report as all others: most of its words follow from the words before."""
    person, place, thing, day = (rng.choice(words) for words in (PEOPLE, PLACES, THINGS, DAYS))
    return f"on {day} {person} sent {rng.integers(2, 10)} boxes of {thing} to {place} ."


rows = [(report(), f"report {number}", "train") for number in range(300)]
for times, count in CANARIES.items():
    for number in range(count):
        text = f"the code of {rng.choice(PEOPLE)} is {' '.join(map(str, rng.integers(10, size=8)))} ."
        rows += [(text, f"canary {number} of those written {times} times", "train")] * times
rows += [(report(), f"report {number}", "test") for number in range(300, 360)]
with Path("documents.csv").open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(("text", "name", "split"))
    writer.writerows(rows)
print(f"{len(rows)} documents in documents.csv")
