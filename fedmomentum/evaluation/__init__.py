"""Scores a model on held-out examples.

Loss and exact match by teacher forcing, and greedy generation, with a common task interface.
"""
