"""Standard benchmarks of a federated model, with lm-evaluation-harness.

The only package that imports lm_eval. Tasks are local files; nothing is downloaded.
"""
