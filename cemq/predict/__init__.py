"""Coefficients only: how skipped steps are served, and put right later."""
