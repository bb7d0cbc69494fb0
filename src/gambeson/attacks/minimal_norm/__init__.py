"""Attacks per image that look for the smallest perturbation."""
