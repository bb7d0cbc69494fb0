"""Attacks that craft one perturbation for all images; a file per method."""
