"""What a run writes and shows: event fan-out, the run directory, the learning curve."""
