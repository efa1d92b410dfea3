"""How far a bundle is from the full-precision, uncached original, and what it saves."""

from cemq.evaluation.compare import Evaluation, Fidelity, evaluate, measure_fidelity

__all__ = ["Evaluation", "Fidelity", "evaluate", "measure_fidelity"]
