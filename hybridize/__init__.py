"""Turns a transformer into a hybrid: chosen attention layers become Mamba layers, distilled back to
the teacher."""

__version__ = "0.1.0"
