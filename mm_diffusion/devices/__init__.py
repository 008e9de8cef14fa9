"""What this machine computes on."""
