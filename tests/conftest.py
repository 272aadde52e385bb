"""Shared set-up: the tests' problems are tiny, and one thread is fastest on them."""

import torch

torch.set_num_threads(1)
