"""From a configuration to a run.

It covers runs in one process or over a network, their plans, comparisons, and the use of the
resulting models.
"""
