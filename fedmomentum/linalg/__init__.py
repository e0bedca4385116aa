"""Low-rank linear algebra on torch tensors: exact sums of products, truncated SVDs, probes.

Knows nothing about adapters or clients.
"""
