"""Which layers cost most, and which of them to give more bits for a goal to be met."""
