"""Devices: the mesh, the sharding of arrays on it, processes of a run, device peaks."""
