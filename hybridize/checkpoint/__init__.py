"""Checkpoint directories on disk: reading, writing, lineage and scores."""
