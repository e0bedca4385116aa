"""The files of a run, typed: manifests, metrics rows, plan, environment.

Each is checked in full when it is read; no tensors and no torch.
"""
