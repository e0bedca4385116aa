"""From a configuration to a run.

In one process or over a network, with its plan; comparisons; and the use of the model that comes
out.
"""
