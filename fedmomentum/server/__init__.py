"""The server of a federation.

It runs the rounds, checks what clients send, screens, measures and checkpoints.
"""
