"""The federated model of a round.

Its adapter, what is merged into the base weights, its files and its exports.
"""
