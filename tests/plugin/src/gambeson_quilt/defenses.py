"""A defence."""

import gambeson as gb


@gb.defenses.register("quiet")
class Quiet(gb.defenses.Defense):
    """Cross-entropy, and a penalty on large logits."""

    weight: float = 0.01
    """Weight of the penalty."""

    def terms(self):
        """The clean term and the penalty."""
        return {
            "clean": (1.0, gb.defenses.Clean()),
            "size": (self.weight, lambda m, batch: m(batch.images).square().mean()),
        }
