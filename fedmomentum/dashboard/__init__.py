"""A page for watching a run, served by a separate process that cannot slow down or break the run.

The process only reads the files in the run directory, has a lower priority than the run, and ends
with it.
"""
