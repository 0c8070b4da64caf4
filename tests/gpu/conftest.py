"""Where there is one GPU, what the tests of two import need not be installed."""

import torch

collect_ignore = ["test_several_gpus.py"] if torch.cuda.device_count() == 1 else []
