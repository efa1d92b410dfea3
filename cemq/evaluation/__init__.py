"""How far a bundle is from the full-precision, uncached original, and what it saves."""

from cemq.evaluation.compare import Evaluation, Fidelity, Outcome, evaluate, measure_fidelity, run_batch, said_of_steps

__all__ = ["Evaluation", "Fidelity", "Outcome", "evaluate", "measure_fidelity", "run_batch", "said_of_steps"]
