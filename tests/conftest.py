"""One thread per test process: the models are tiny, and other processes share the cores."""

import torch as th

th.set_num_threads(1)
