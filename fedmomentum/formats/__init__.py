"""The files of a run, typed: manifests, metrics rows, plan, environment.

Each file is fully checked when it is read. This package has no tensors and does not use torch.
"""
