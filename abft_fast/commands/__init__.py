"""Provide every verb of the command line as a function that a program can call.

`checks` is the only module that is light to import; see there.
"""
