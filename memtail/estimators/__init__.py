"""Estimators: pure functions from statistics to values and standard errors, by the equations of Feldman and Zhang (2020).

With M membership, C and T correctness on training and test examples, k_in(i) = sum_k M_ki and k_out(i) = t - k_in(i):

    mem_i    = sum_k M_ki C_ki / k_in(i)  -  sum_k (1 - M_ki) C_ki / k_out(i)
    infl_ij  = (M^T T)_ij / k_in(i)       -  ((1 - M)^T T)_ij / k_out(i)
    SE^2     = p~_in (1 - p~_in) / (k_in + 2)  +  p~_out (1 - p~_out) / (k_out + 2)

p_in and p_out are the two terms of an estimate, and p~ = (p k + 1) / (k + 2): see `memtail.estimators.binomial`. An example in every
subset, or in none, has no estimate: NaN, never 0.
"""

from memtail.estimators.convergence import Stage, convergence
from memtail.estimators.false_discovery import FalseDiscovery, false_discovery
from memtail.estimators.influence import Influence, influence, influence_at, influence_blocks
from memtail.estimators.memorization import Memorization, expected_standard_error, memorization
from memtail.estimators.pairs import Pairs, high_influence_pairs
from memtail.estimators.top import top_influencers

__all__ = [
    "FalseDiscovery",
    "Influence",
    "Memorization",
    "Pairs",
    "Stage",
    "convergence",
    "expected_standard_error",
    "false_discovery",
    "high_influence_pairs",
    "influence",
    "influence_at",
    "influence_blocks",
    "memorization",
    "top_influencers",
]
