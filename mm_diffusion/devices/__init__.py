"""What this machine computes on."""

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # the next call overwrites their outputs
AUTO, BLOCKS = "auto", "blocks"  # of --compile: see compile_choice.py and compiled.py
