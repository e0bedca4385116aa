"""The configuration file: one documented dataclass a section; reading, checking and writing it."""
