"""Files, devices, processes and progress."""
