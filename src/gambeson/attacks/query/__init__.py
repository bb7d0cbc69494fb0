"""Per-image attacks that only query the model's scores, within a budget."""
