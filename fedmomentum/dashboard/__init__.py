"""A page to watch a run on, served by a process of its own: nothing there can slow or fail the run.

The process reads the files of the run directory and nothing else, at a lower priority than the
run's, and ends with it.
"""
