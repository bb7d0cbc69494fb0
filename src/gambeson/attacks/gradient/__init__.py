"""Attacks per image that follow the gradient: FGSM to PGD, their transferable variants, and Auto-PGD."""
