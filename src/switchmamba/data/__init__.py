"""From text to training samples: tokenizer, corpus, token shards and the sampler.

``prepare`` reads documents (:mod:`~switchmamba.data.corpus`), tokenises them and writes a directory of token
shards with an index (:mod:`~switchmamba.data.index`). :class:`~switchmamba.data.shards.TokenShards` maps such
a directory into memory and :class:`~switchmamba.data.sampler.Sampler` cuts it into windows. Nothing here
imports torch before a batch is asked for.
"""
