"""The federated model of a round.

This covers its adapter, the parts merged into the base weights, its files and its exports.
"""
