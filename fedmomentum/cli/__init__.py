"""The command line, one file a group of commands.

Parse, call, print: no arithmetic here.
"""
