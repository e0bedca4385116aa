"""Differential privacy of one party: entropy, the accountant, and the ledger of what is spent.

What is trained privately, and how, is in `fedmomentum.training.private_trainer`.
"""
