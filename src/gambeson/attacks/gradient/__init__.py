"""Per-image gradient attacks: FGSM to PGD, their transferable variants, and Auto-PGD."""
