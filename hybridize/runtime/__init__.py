"""Devices, loading, forward passes, and processes."""
