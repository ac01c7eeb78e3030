"""Fused attention kernels for GPUs, and the selection of the one that a program uses."""
