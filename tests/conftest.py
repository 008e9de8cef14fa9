"""One thread per test process: the models are tiny, and other processes share the cores."""

import os

import torch as th

th.set_num_threads(1)
if not th.cuda.is_available():  # Triton's kernels then run in its interpreter, on CPUs
    os.environ["TRITON_INTERPRET"] = "1"
