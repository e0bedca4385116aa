"""The server of a federation.

It runs the rounds: it checks and screens what clients send, and measures and checkpoints the model.
"""
