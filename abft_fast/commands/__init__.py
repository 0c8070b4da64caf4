"""Provide every verb of the command line as a function that a program can call.

`checks`, `printing`, `prediction_files` and `adapter_origin` import no torch, so a mistake is
answered in about a second. The modules of the verbs do.
"""
