"""Fused attention kernels for accelerators, and which of them a program uses."""
