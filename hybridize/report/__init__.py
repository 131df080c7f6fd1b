"""A report on checkpoints and their measurements, as one HTML page."""
