"""Devices, model loading, forward passes, and distributed processes."""
