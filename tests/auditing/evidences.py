"""An audit that has only begun, for tests of single stages and diagnostics."""

from gambeson.auditing import Evidence
from gambeson.auditing.results import Subject
from gambeson.evaluation.universal import accuracy_rate
from gambeson.victim import predict, score


def evidence_of(victim, data, suite):
    """What an audit knows before its first stage, of a victim inside its context."""
    look = victim.meet(data.test.take(slice(0, 8))[0])
    victim.passes = suite.draws if look.stochastic else 1
    predictions = predict(victim, data.test)
    return Evidence(
        victim=victim,
        data=data,
        suite=suite,
        seed=0,
        subject=Subject(label="model", name="model", parameters=0, fingerprint="", random=look.stochastic),
        clean=accuracy_rate(score(predictions, data.test)),
        predictions=predictions,
    )
