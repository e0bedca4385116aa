"""Differential privacy of one party: entropy, the accountant, and the ledger of spending.

The private training itself is in `fedmomentum.training.private_trainer`.
"""
