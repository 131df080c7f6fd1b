"""Rows of text in every form, encoded and packed into batches."""
