"""Secure sums of vectors, whose individual values nobody sees.

Implements the protocol of Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving
Machine Learning, CCS 2017, with double masking over the complete graph of parties, as two state
machines that exchange bytes.
"""
