"""Standard benchmarks of a federated model, by lm-evaluation-harness.

The only package that imports lm_eval. Its tasks are local files: nothing is downloaded.
"""
