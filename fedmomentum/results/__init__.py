"""Run directories as typed results: rounds, summaries, comparisons.

This package only reads files; it imports neither torch nor matplotlib.
"""
