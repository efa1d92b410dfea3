"""Layers computed by other libraries; each module here is imported when its backend is used."""
