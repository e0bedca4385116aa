"""What travels between server and clients.

Typed tasks and replies, their encoding, and the transport's interface.
"""
