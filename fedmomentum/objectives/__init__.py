"""Training and scoring objectives by task type: a batch in, a loss and scores out.

Local training and evaluation use the same objective, so their losses are comparable.
"""
