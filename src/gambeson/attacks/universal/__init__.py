"""Universal attacks, one file per method."""
