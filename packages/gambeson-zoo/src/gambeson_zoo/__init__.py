"""Files of ``gambeson.zoo``: networks, perturbations, cards, training runs and audits, listed in ``manifest.json``."""
