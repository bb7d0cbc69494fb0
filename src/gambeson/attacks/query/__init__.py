"""Attacks per image that only ask the model for its scores, within a budget of queries."""
