"""What lies on disk: reading, writing, lineage and scores of checkpoint directories."""
