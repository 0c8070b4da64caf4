"""Every option: its default, its help and its validation, once."""
