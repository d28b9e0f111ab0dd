"""Writes cancer.csv: the breast cancer data of scikit-learn, 30 features of cell nuclei, with a split."""

import numpy as np
from sklearn.datasets import load_breast_cancer

data = load_breast_cancer(as_frame=True)
table = data.frame.drop(columns="target")
table.insert(0, "diagnosis", data.target_names[data.target])
table.insert(1, "patient", [f"patient {number}" for number in range(len(table))])
table.insert(2, "split", np.where(np.random.default_rng(0).random(len(table)) < 0.2, "test", "train"))
table.to_csv("cancer.csv", index=False)
print(f"{len(table)} rows in cancer.csv")
