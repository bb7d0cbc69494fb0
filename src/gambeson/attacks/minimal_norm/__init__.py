"""Per-image attacks that search for the smallest perturbation."""
