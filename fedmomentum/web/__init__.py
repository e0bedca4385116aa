"""A port for HTTP that strangers cannot occupy; what is served there is its callers' affair."""
