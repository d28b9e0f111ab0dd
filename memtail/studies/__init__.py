"""The follow-up experiments of the paper: what its scores are worth, and what follows from them.

* `removal`: what the memorized examples, or those of the high-influence pairs, do for the accuracy.
* `stability`: how much of the scores another run would find again.
* `architectures`: how much of them other models find.

Each takes experiments in a store, and leaves there a result (see `memtail.studies.result`) under the first of them. What a study trains is
an ordinary experiment of its own, with the subsets that it needs as the masks of an `explicit` design.
"""
