"""Training rows in all supported forms, their encoding, and their packing into batches."""
