"""Losses where one process has not everything: a vocabulary or a sequence that is cut over the processes of a group.

The ``linear_*`` functions take ``group=`` (or DTensors) for a vocabulary matrix that is cut; here is what else that needs.
"""

from fastloss.parallel.sequence import SequenceShard, sequence_shard, sum_over_shards
from fastloss.parallel.vocabulary import vocab_parallel_cross_entropy, vocab_shards

__all__ = [
    "SequenceShard",
    "sequence_shard",
    "sum_over_shards",
    "vocab_parallel_cross_entropy",
    "vocab_shards",
]
