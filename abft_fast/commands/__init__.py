"""What each verb of the command line does, as functions that a program can call."""
