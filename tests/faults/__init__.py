"""The fault suite: real coordinators and nodes over loopback, one fault at a time. `python -m tests.faults --help`."""
