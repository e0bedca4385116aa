"""What travels between server and clients.

This includes typed tasks and replies, their encoding, and the transport interface.
"""
