"""Sums of vectors of which nobody sees a single one.

The protocol of Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine
Learning, CCS 2017, with double masking over the full graph of parties, as two state machines that
exchange bytes.
"""
