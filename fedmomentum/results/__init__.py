"""Run directories as typed results: rounds, summaries, comparisons.

Reads files only; imports neither torch nor matplotlib.
"""
