"""Every published way to skip work, run on the same samples at the same compute."""
