"""An HTTP listener with limits on unauthenticated connections; what it serves is up to callers."""
