"""The command line, with one file per group of commands.

Commands only parse arguments, call functions and print results.
"""
