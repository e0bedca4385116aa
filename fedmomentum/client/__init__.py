"""One client of a federation.

It receives a task, trains or evaluates the model it holds, and replies.
"""
