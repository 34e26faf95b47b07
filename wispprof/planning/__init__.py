"""From profiles to tables: draft lengths, batches, capacity, break-even."""
