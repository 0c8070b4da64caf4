"""Attend within packed prompts: by flash attention, with its log-sum-exp, or one by one."""
