"""What skipped steps are predicted from: outputs, residuals of the blocks, or outputs of their modules."""
