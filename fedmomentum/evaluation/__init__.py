"""Scores of a model on held-out examples.

Loss and exact match by teacher forcing, and greedy generation, behind one contract for tasks.
"""
