"""Follow-up studies of the paper: the reliability of an experiment's scores, and conclusions from them.

Each study reads the scores of one or more experiments in a store and writes a result to the store, under the first of them (see
`memtail.studies.result`). The models that a study trains are an ordinary experiment: either with the study's subsets as the masks of an
`explicit` design (see `retraining`), or on a dataset of features (see `features`).

To add a study, write a module with a function `prepare` (see `memtail.studies.study`) and add it to `STUDIES`: the command line makes a
command of it, and report and explorer show every result in the store.
"""

from memtail.studies.study import Study

#: All studies by name, in the order of the help text.
STUDIES = {
    "removal": Study(
        "memtail.studies.removal",
        "Retrain without the memorized examples. For comparison, other models are trained without equally many random examples.",
        trains=True,
    ),
    "stability": Study(
        "memtail.studies.stability",
        "Compare the scores of halves of the trials. The trials that two runs need to agree are estimated from that.",
    ),
    "architectures": Study(
        "memtail.studies.architectures",
        "Compare the scores of different models. The result is stored under the first experiment.",
    ),
    "last-layer": Study(
        "memtail.studies.last_layer",
        "Compare with training the last layer alone. The other layers are frozen layers of one model trained on all examples; this one "
        "model is trained on this machine, also with --submit.",
        trains=True,
    ),
    "duplicates": Study(
        "memtail.studies.duplicates",
        "Find near-duplicates and their share of the pairs. Images are compared by pixels and by features of one model trained on all "
        "examples; this one model is trained on this machine, also with --submit.",
        trains=True,
    ),
}
